"""What a forward brings to a cache: where it starts, what of it is padding, and what is wrong."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CacheStateError, CapacityError, NonFiniteError
from ..layout import Layout
from ..state import CODED, LENGTH, PAD
from .masks import visible


class Intake(NamedTuple):
    """Of every row [B]: the state it starts from, and the one it leads to.

    ``pad``, ``length``, ``coded``: after a new start or a rewind, before this forward's tokens.
    ``lead``: tokens of this forward that are left padding. ``new_length``, ``new_coded``: after
    it. ``bad_*`` [] bool: why nothing may be stored.
    """

    pad: Tensor
    length: Tensor
    coded: Tensor
    lead: Tensor
    new_length: Tensor
    new_coded: Tensor
    bad_value: Tensor
    bad_position: Tensor
    bad_room: Tensor

    @property
    def bad(self) -> Tensor:
        return self.bad_value | self.bad_position | self.bad_room


def own_validity(mask: Tensor | None, position: Tensor, batch: int) -> Tensor:
    """[B, T] bool: which of a forward's tokens some query of that forward may see."""
    if mask is None:
        return torch.ones(batch, position.shape[0], dtype=torch.bool, device=position.device)
    inside = position.clamp(max=mask.shape[-1] - 1)  # past the end is reported as such
    own = visible(mask.index_select(-1, inside)).any(1).any(1)
    return own.expand(batch, -1)


def leading(valid: Tensor) -> Tensor:
    """Of tokens [B, T] that some query may see: how many come before the first one, [B]."""
    return torch.where(valid.any(1), valid.to(torch.int8).argmax(1), valid.shape[1])


def finite_tokens(x: Tensor) -> Tensor:
    """[B, T] bool: which tokens of keys or values [B, H, T, D] are finite, read once."""
    if not x.is_cuda:  # where the norm takes five times as long
        return torch.isfinite(x.abs().amax(-1)).all(1)
    return torch.isfinite(torch.linalg.vector_norm(x, torch.inf, -1)).all(1)


def intake(
    k: Tensor, v: Tensor, mask: Tensor | None, position: Tensor, meta: Tensor, layout: Layout
) -> Intake:
    """Read a forward's keys and values [B, H, T, D] against ``meta``.

    One token goes into the ring, where whoever keeps the pool has made room. So do several that
    fit; of more, what the ring does not keep leaves it in whole strides.

    Raises:
        NonFiniteError, CapacityError, CacheStateError: on the CPU.
    """
    batch, _, tokens, _ = k.shape
    valid = own_validity(mask, position, batch)
    seen = meta[:, PAD] + meta[:, LENGTH]
    start = position[0]
    fresh = (start == 0) & (seen > 0)
    pad = torch.where(fresh, 0, meta[:, PAD])
    length = torch.where(fresh, 0, meta[:, LENGTH])
    coded = torch.where(fresh, 0, meta[:, CODED])
    # A rewind drops tokens that are still in the ring: only the count changes.
    back = pad + length - start
    length = torch.where(start < pad + length, length - back, length)
    in_ring = length >= coded + torch.where(coded > 0, layout.sinks, 0)
    pad = torch.where(length < 0, pad + length, pad)
    length = length.clamp(min=0)
    steps = torch.arange(tokens, device=k.device)
    bad_position = ((pad + length != start) | ~in_ring).any() | (position != start + steps).any()

    # Left padding: what precedes the first visible token of an empty row.
    lead = torch.where(length == 0, leading(valid), 0)
    new_length = length + tokens - lead

    stored = steps >= lead[:, None]
    bad_value = (stored & ~(finite_tokens(k) & finite_tokens(v))).any()
    bad_room = start + tokens > layout.max_tokens
    i_new = (new_length - layout.sinks).clamp(min=0)
    if tokens == 1:
        new_coded = coded
        bad_room = bad_room | (i_new - coded > layout.ring).any()
    else:
        new_coded = (i_new - layout.recent).clamp(min=0) // layout.stride * layout.stride
        holds = i_new - coded <= layout.ring  # then it waits for the next step
        new_coded = torch.where(holds, coded, torch.maximum(coded, new_coded))
    if not k.is_cuda:
        _raise_now(bad_value, bad_position, bad_room, k, v, stored, start, seen, layout)
    moved = (torch.where(length == 0, pad + lead, pad), length, coded, lead)
    return Intake(*moved, new_length, new_coded, bad_value, bad_position, bad_room)


class Sources:
    """Tokens that are still exact, by i: old ones from the ring, new ones from a forward."""

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        exact_keys: Tensor,
        exact_values: Tensor,
        found: Intake,
        layout: Layout,
    ) -> None:
        self._layout, self._found, self.k, self.v = layout, found, k, v
        self._exact = exact_keys, exact_values
        self.i_old = (found.length - layout.sinks).clamp(min=0)

    def pick(self, i: Tensor) -> tuple[Tensor, Tensor]:
        """[B, n] or [B, H, n] token indices -> keys and values [B, H, n, D]."""
        layout, found, tokens = self._layout, self._found, self.k.shape[2]
        if i.dim() == 2:
            i = i[:, None].expand(-1, self.k.shape[1], -1)
        per_row = (-1, 1, 1)
        new = (i + layout.sinks - (found.length - found.lead).view(per_row)).clamp(0, tokens - 1)
        is_old = (i < self.i_old.view(per_row)).unsqueeze(-1)
        shape = (-1, -1, -1, self.k.shape[-1])
        old, new = (x.unsqueeze(-1).expand(shape) for x in (layout.sinks + i % layout.ring, new))
        pairs = zip(self._exact, (self.k, self.v), strict=True)
        keys, values = (torch.where(is_old, a.gather(2, old), b.gather(2, new)) for a, b in pairs)
        return keys, values


def _raise_now(bad_value, bad_position, bad_room, k, v, stored, start, seen, layout) -> None:
    if bad_value:
        which = []
        for name, x in (("keys", k), ("values", v)):
            where = stored[:, None, :] & ~torch.isfinite(x).all(-1)
            if where.any():
                b, h, t = (int(n) for n in where.nonzero()[0])
                which.append(f"{name} (row {b}, kv head {h}, token {t} of this forward)")
        raise NonFiniteError(
            f"NaN or Inf in {' and '.join(which)}. Nothing was stored. The model's activations "
            "overflowed before the cache: try bfloat16 or float32, or check the weights."
        )
    if bad_position:
        raise CacheStateError(
            f"This forward writes at slot {int(start)}, but the cache has seen {int(seen[0])} "
            "tokens. A cache is written in order; it may start again at 0 or rewind within the "
            "recent window. Call cache.crop() or reset() first, or give each model its own."
        )
    if bad_room and int(start) + k.shape[2] <= layout.max_tokens:
        raise CacheStateError(
            "the exact window is full: its oldest tokens were not moved into pages before this "
            "step. Run the graph through the backend that compiled it."
        )
    if bad_room:
        raise CapacityError(
            f"The cache was made for {layout.max_tokens} tokens; this forward ends at token "
            f"{int(start) + k.shape[2]}. Make the cache with a larger max_cache_len."
        )
