"""What the ops know of a layer's state: names, order and index arithmetic.

Tokens of a row are numbered from its first token that is not left padding.
Token t sits in a sink (t < sinks), else in the ring or in a page by
``i = t - sinks``: pages hold ``i < coded``, as far as it is kept, the ring the rest, at
``i % ring``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .codes import Basis, Frame
from .errors import CacheStateError
from .layout import Layout

# Columns of ``meta`` [B, 4] int64
PAD, LENGTH, CODED, FLAGS = range(4)

# Columns of ``info`` [pages, 2] int32. A page's token at slot 0 has ``i`` = BASE, or, where it
# is tracked, BASE + its gap. KIND is ``tier * PER_TIER + slots in use``.
BASE, KIND = range(2)
PER_TIER = 1 << 16

# Bits of ``meta[:, FLAGS]``, set where no exception can be raised (CUDA) and read between steps
FLAG_NONFINITE, FLAG_POSITION, FLAG_FULL, FLAG_LOST = 1, 2, 4, 8

FLAG_TEXT = {
    FLAG_NONFINITE: "NaN or Inf in the keys or values of a forward; nothing of it was stored",
    FLAG_POSITION: "a forward wrote at a position that does not follow the tokens already seen",
    FLAG_FULL: "more tokens were written than the cache was made for",
    FLAG_LOST: "storing a prompt was interrupted, and its tokens are not in the cache",
}


class State(NamedTuple):
    """The tensors of one layer, in the order the ops take them.

    ``exact_keys``, ``exact_values`` [B, H, sinks + ring, D]: sinks, then the ring.
    ``queries`` [B, Hq, observed, D]: of the tokens in the ring, as far as they are kept.
    ``meta`` [B, 4] int64: left padding, tokens, tokens that have left the ring, error flags.
    ``pool`` [pages, page_bytes] uint8 and ``info`` [pages, 2] int32: pages of all layers.
    ``table`` [B, H, max_pages] int32: which are whose, in the order of their tokens within a
    tier; -1 is none.
    ``visits``, ``segments``, ``first``: what each program of a GPU kernel goes through
    (``work.Work``), made of ``table`` between steps; empty elsewhere.
    ``turn`` [2, D]: plan of the rotary turn, empty where the layout has no blocks.
    The frame tensors (``codes.Basis``) are constant while tokens are stored (empty for an exact
    layout); ``loss`` [H, 4, tiers] is what coding in them loses (``calibrate.fit_frames``).
    """

    exact_keys: Tensor
    exact_values: Tensor
    queries: Tensor
    meta: Tensor
    pool: Tensor
    info: Tensor
    table: Tensor
    visits: Tensor
    segments: Tensor
    first: Tensor
    turn: Tensor
    key_into: Tensor
    key_back: Tensor
    key_grid: Tensor
    key_plan: Tensor
    value_into: Tensor
    value_back: Tensor
    value_grid: Tensor
    value_plan: Tensor
    loss: Tensor

    @property
    def key_basis(self) -> Basis:
        return Basis(self.key_into, self.key_back, self.key_grid, self.key_plan)

    @property
    def value_basis(self) -> Basis:
        return Basis(self.value_into, self.value_back, self.value_grid, self.value_plan)

    def frames(self, layout: Layout, tier: int) -> tuple[Frame, Frame]:
        """The key and the value frame of a tier."""
        first, digits = layout.digits_before(tier), layout.tiers[tier]
        if layout.kind == "rings":
            first, digits = type(first)(0, 0), type(digits)(0, 0)
        return (
            self.key_basis.frame(tier, first.key, digits.key),
            self.value_basis.frame(tier, first.value, digits.value),
        )


FIRST_FRAME = State._fields.index("key_into")


def ring_tokens(meta: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Which ``i`` sits in each ring slot.

    Returns ([B, ring] int64, [B, ring] bool): the index and whether the slot is in use.
    """
    slots = torch.arange(layout.ring, device=meta.device)
    count = (meta[:, LENGTH] - layout.sinks).clamp(min=0)[:, None]
    i = count - 1 - (count - 1 - slots) % layout.ring
    return i, (i >= meta[:, CODED, None]) & (i >= 0)


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
