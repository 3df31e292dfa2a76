"""``append`` in plain PyTorch: the specification of ``skv::append``.

Nothing here reads a tensor's value on an accelerator, so it can be captured in a
CUDA graph. On the CPU values are read, to raise errors on the spot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Layout
from ..state import FLAG_FULL, FLAG_NONFINITE, FLAG_POSITION, FLAGS
from .intake import Sources, intake


def append(
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    position: Tensor,
    exact_keys: Tensor,
    exact_values: Tensor,
    meta: Tensor,
    layout: Layout,
) -> None:
    """Store the tokens of a forward in sinks and ring, and count them.

    What leaves the ring has been taken over by ``retain`` before.

    Args:
        k, v: [B, H, T, D].
        mask: [B or 1, H or 1, T, S] or None. A token that no query of its own forward
            may see, before the row's first visible token, is padding and is not stored.
        position: [T] int64 slots of the dense cache this stands for. They follow the slots
            seen so far, rewind within the ring, or start again at 0.
        exact_keys, exact_values, meta: of the state, mutated in place.

    Raises:
        NonFiniteError, CapacityError, CacheStateError: on the CPU, before anything is
            written. Elsewhere the same conditions set ``meta[:, FLAGS]`` and store nothing.
    """
    batch = k.shape[0]
    found = intake(k, v, mask, position, meta, layout)
    sources = Sources(k, v, exact_keys, exact_values, found, layout)
    i_new = (found.new_length - layout.sinks).clamp(min=0)

    # The ring keeps the last tokens, the sinks the first.
    slots = torch.arange(layout.ring, device=k.device)
    i = i_new[:, None] - 1 - (i_new[:, None] - 1 - slots) % layout.ring
    take_ring = (i >= sources.i_old[:, None]) & (i >= 0) & ~found.bad
    rk, rv = sources.pick(i.clamp(min=0))
    t = torch.arange(layout.sinks, device=k.device)
    new = (t >= found.length[:, None]) & (t < found.new_length[:, None])
    take_sink = new & ~found.bad
    take = torch.cat([take_sink.expand(batch, -1), take_ring], 1)[:, None, :, None]
    sk, sv = pick_new(k, v, t - found.length[:, None] + found.lead[:, None])
    for exact, sink, ring in ((exact_keys, sk, rk), (exact_values, sv, rv)):
        exact.copy_(torch.where(take, torch.cat([sink, ring], 2), exact))

    flags = meta[:, FLAGS]
    for bit, failed in (
        (FLAG_NONFINITE, found.bad_value),
        (FLAG_POSITION, found.bad_position),
        (FLAG_FULL, found.bad_room),
    ):
        flags = flags | torch.where(failed, bit, 0)
    updated = torch.stack([found.pad, found.new_length, found.new_coded], 1)
    meta[:, :FLAGS] = torch.where(found.bad, meta[:, :FLAGS], updated)
    meta[:, FLAGS] = flags


def pick_new(k: Tensor, v: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens j [B, n] of this forward, clamped: [B, H, n, D]."""
    batch, heads, tokens, head_dim = k.shape
    at = j.clamp(0, tokens - 1)[:, None, :, None].expand(batch, heads, -1, head_dim)
    return k.gather(2, at), v.gather(2, at)
