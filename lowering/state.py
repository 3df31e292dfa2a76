"""What the ops know of a layer's state: names, order and index arithmetic.

Tokens of a row are numbered from its first token that is not left padding.
Token t sits in a sink (t < sinks), else in the ring or in a page by
``i = t - sinks``: pages hold ``i < pages * P``, the ring the rest, at ``i % ring``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .codes import Frame
from .errors import CacheStateError
from .layout import Layout

# Columns of ``meta`` [B, 4] int64
PAD, LENGTH, PAGES, FLAGS = range(4)

# Bits of ``meta[:, FLAGS]``, set where no exception can be raised (CUDA) and read between steps
FLAG_NONFINITE, FLAG_POSITION, FLAG_FULL = 1, 2, 4

FLAG_TEXT = {
    FLAG_NONFINITE: "NaN or Inf in the keys or values of a forward; nothing of it was stored",
    FLAG_POSITION: "a forward wrote at a position that does not follow the tokens already seen",
    FLAG_FULL: "more tokens were written than the cache was made for",
}


class State(NamedTuple):
    """The tensors of one layer, in the order the ops take them.

    ``exact_keys``, ``exact_values`` [B, H, sinks + ring, D]: sinks, then the ring.
    ``pool`` [B * H * max_pages + 1, page_bytes] uint8: page n of (b, h) at
    ``(b * H + h) * max_pages + n``; the last page is scratch, written when nothing is due.
    ``meta`` [B, 4] int64: left padding, tokens, full pages, error flags.
    ``turn`` [2, D]: plan of the rotary turn, empty where the layout has no blocks.
    The frame tensors are constant while tokens are stored (empty for an exact layout).
    """

    exact_keys: Tensor
    exact_values: Tensor
    pool: Tensor
    meta: Tensor
    turn: Tensor
    key_into: Tensor
    key_grid: Tensor
    key_plan: Tensor
    key_out: Tensor
    value_into: Tensor
    value_grid: Tensor
    value_plan: Tensor
    value_out: Tensor

    @property
    def key_frame(self) -> Frame:
        return Frame(self.key_into, self.key_grid, self.key_plan, self.key_out)

    @property
    def value_frame(self) -> Frame:
        return Frame(self.value_into, self.value_grid, self.value_plan, self.value_out)


def ring_tokens(meta: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Which ``i`` sits in each ring slot.

    Returns ([B, ring] int64, [B, ring] bool): the index and whether the slot is in use.
    """
    slots = torch.arange(layout.ring, device=meta.device)
    count = (meta[:, LENGTH] - layout.sinks).clamp(min=0)[:, None]
    i = count - 1 - (count - 1 - slots) % layout.ring
    first = meta[:, PAGES, None] * layout.page_tokens
    return i, (i >= first) & (i >= 0)


def page_ids(batch: int, heads: int, max_pages: int, first: Tensor, count: int) -> Tensor:
    """[B] first pages -> pool rows [B, H, count] of the ``count`` pages from there."""
    rows = torch.arange(batch * heads, device=first.device).view(batch, heads, 1)
    steps = torch.arange(count, device=first.device)
    return rows * max_pages + (first[:, None, None] + steps)


def describe_flags(flags: int) -> str:
    """Error flags in words."""
    return "; ".join(text for bit, text in FLAG_TEXT.items() if flags & bit)


def raise_flags(flags: int, where: str) -> None:
    """Raise what a device could only flag."""
    if flags:
        raise CacheStateError(
            f"{where}: {describe_flags(flags)}. What was generated since then is not valid; "
            "call cache.reset() and run the prompt again."
        )
