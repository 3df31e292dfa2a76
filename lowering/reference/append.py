"""``append`` in plain PyTorch: the specification of ``skv::append``.

Nothing here reads a tensor's value on an accelerator, so it can be captured in a
CUDA graph. On the CPU values are read, to raise errors on the spot and to skip
pages that are not due.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CacheStateError, CapacityError, NonFiniteError
from ..layout import Layout
from ..state import (
    FLAG_FULL,
    FLAG_NONFINITE,
    FLAG_POSITION,
    FLAGS,
    LENGTH,
    PAD,
    PAGES,
    State,
    page_ids,
)
from .masks import visible
from .pages import encode_pages


def own_validity(mask: Tensor | None, position: Tensor, batch: int) -> Tensor:
    """[B, T] bool: which of a forward's tokens some query of that forward may see."""
    if mask is None:
        return torch.ones(batch, position.shape[0], dtype=torch.bool, device=position.device)
    inside = position.clamp(max=mask.shape[-1] - 1)  # past the end is reported as such
    own = visible(mask.index_select(-1, inside)).any(1).any(1)
    return own.expand(batch, -1)


def append(
    k: Tensor, v: Tensor, mask: Tensor | None, position: Tensor, state: State, layout: Layout
) -> None:
    """Store the tokens of a forward: sinks, ring, and pages as they fill.

    Args:
        k, v: [B, H, T, D].
        mask: [B or 1, H or 1, T, S] or None. A token that no query of its own forward
            may see, before the row's first visible token, is padding and is not stored.
        position: [T] int64 slots of the dense cache this stands for. They follow the slots
            seen so far, rewind within the ring, or start again at 0.
        state: mutated in place.

    Raises:
        NonFiniteError, CapacityError, CacheStateError: on the CPU, before anything is
            written. Elsewhere the same conditions set ``meta[:, FLAGS]`` and store nothing.
    """
    batch, heads, tokens, head_dim = k.shape
    meta = state.meta
    on_cpu = not k.is_cuda
    valid = own_validity(mask, position, batch)

    seen = meta[:, PAD] + meta[:, LENGTH]
    start = position[0]
    fresh = (start == 0) & (seen > 0)
    pad = torch.where(fresh, 0, meta[:, PAD])
    length = torch.where(fresh, 0, meta[:, LENGTH])
    pages = torch.where(fresh, 0, meta[:, PAGES])
    # A rewind drops tokens that are still in the ring: only the count changes.
    back = pad + length - start
    length = torch.where(start < pad + length, length - back, length)
    in_ring = length >= pages * layout.page_tokens + torch.where(pages > 0, layout.sinks, 0)
    pad = torch.where(length < 0, pad + length, pad)
    length = length.clamp(min=0)
    steps = torch.arange(tokens, device=k.device)
    bad_position = ((pad + length != start) | ~in_ring).any() | (position != start + steps).any()

    # Left padding: what precedes the first visible token of an empty row.
    lead = torch.where(valid.any(1), valid.to(torch.int8).argmax(1), tokens)
    lead = torch.where(length == 0, lead, 0)
    new_length = length + tokens - lead

    stored = steps >= lead[:, None]
    finite = torch.isfinite(k).all(-1).all(1) & torch.isfinite(v).all(-1).all(1)
    bad_value = (stored & ~finite).any()
    i_new = (new_length - layout.sinks).clamp(min=0)
    new_pages = torch.maximum(pages, (i_new - layout.recent).clamp(min=0) // layout.page_tokens)
    bad_room = start + tokens > layout.max_tokens

    if on_cpu:
        _raise_now(bad_value, bad_position, bad_room, k, v, stored, start, seen, layout)
    bad = bad_value | bad_position | bad_room

    # Everything below reads old tokens from the ring and new ones from k and v.
    i_old = (length - layout.sinks).clamp(min=0)
    sources = [
        torch.cat([exact[:, :, layout.sinks :], x], dim=2)
        for exact, x in ((state.exact_keys, k), (state.exact_values, v))
    ]

    def pick(i: Tensor) -> tuple[Tensor, Tensor]:
        """[B, n] token indices -> keys and values [B, H, n, D]."""
        old = i % layout.ring
        new = layout.ring + i + layout.sinks - length[:, None] + lead[:, None]
        at = torch.where(i < i_old[:, None], old, new.clamp(layout.ring, layout.ring + tokens - 1))
        at = at[:, None, :, None].expand(-1, heads, -1, head_dim)
        return sources[0].gather(2, at), sources[1].gather(2, at)

    # Pages that fill up. A page not due is encoded too where values can't be read, into scratch.
    due = (new_pages - pages).clamp(min=0)
    most = (tokens + layout.page_tokens - 1) // layout.page_tokens + (1 if tokens > 1 else 0)
    most = min(most, layout.max_pages)
    if on_cpu:
        most = min(most, int(due.max()))
    if most > 0:
        numbers = torch.arange(most, device=k.device)
        i = pages[:, None] * layout.page_tokens + torch.arange(
            most * layout.page_tokens, device=k.device
        )
        fresh_pages = encode_pages(*pick(i), pages[:, None] + numbers, state, layout)
        ids = page_ids(batch, heads, layout.max_pages, pages, most)
        write = (numbers < due[:, None])[:, None, :] & ~bad
        ids = torch.where(write, ids, state.pool.shape[0] - 1)
        state.pool.index_copy_(0, ids.flatten(), fresh_pages.flatten(0, 2))

    # The ring keeps the last tokens, the sinks the first.
    slots = torch.arange(layout.ring, device=k.device)
    i = i_new[:, None] - 1 - (i_new[:, None] - 1 - slots) % layout.ring
    take_ring = (i >= i_old[:, None]) & (i >= 0) & ~bad
    rk, rv = pick(i.clamp(min=0))
    t = torch.arange(layout.sinks, device=k.device)
    take_sink = (t >= length[:, None]) & (t < new_length[:, None]) & ~bad
    take = torch.cat([take_sink.expand(batch, -1), take_ring], 1)[:, None, :, None]
    sk, sv = _pick_new(k, v, t - length[:, None] + lead[:, None])
    for exact, sink, ring in ((state.exact_keys, sk, rk), (state.exact_values, sv, rv)):
        exact.copy_(torch.where(take, torch.cat([sink, ring], 2), exact))

    flags = meta[:, FLAGS]
    for bit, failed in (
        (FLAG_NONFINITE, bad_value),
        (FLAG_POSITION, bad_position),
        (FLAG_FULL, bad_room),
    ):
        flags = flags | torch.where(failed, bit, 0)
    updated = torch.stack([pad + torch.where(length == 0, lead, 0), new_length, new_pages], 1)
    meta[:, :FLAGS] = torch.where(bad, meta[:, :FLAGS], updated)
    meta[:, FLAGS] = flags


def _pick_new(k: Tensor, v: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens j [B, n] of this forward, clamped: [B, H, n, D]."""
    batch, heads, tokens, head_dim = k.shape
    at = j.clamp(0, tokens - 1)[:, None, :, None].expand(batch, heads, -1, head_dim)
    return k.gather(2, at), v.gather(2, at)


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
    if bad_room:
        raise CapacityError(
            f"The cache was made for {layout.max_tokens} tokens; this forward ends at token "
            f"{int(start) + k.shape[2]}. Make the cache with a larger max_cache_len."
        )
