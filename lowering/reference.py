"""``append`` and ``attend`` in plain PyTorch: the specification of both ops.

Nothing here reads a tensor's value on an accelerator, so it can be captured in a
CUDA graph. On the CPU values are read, to raise errors on the spot and to skip
pages that do not exist.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import codes
from .errors import CacheStateError, CapacityError, NonFiniteError, SkvError
from .layout import EXACT_DTYPES, Layout
from .state import (
    FLAG_FULL,
    FLAG_NONFINITE,
    FLAG_POSITION,
    FLAGS,
    LENGTH,
    PAD,
    PAGES,
    State,
    page_ids,
    ring_tokens,
)

PAGES_PER_CHUNK = 32  # bounds the dense working set of the reference


# ---------------------------------------------------------------- pages


def encode_pages(k: Tensor, v: Tensor, state: State, layout: Layout) -> Tensor:
    """[B, H, n * P, D] keys and values -> [B, H, n, page_bytes] pages."""
    batch, heads, tokens, _ = k.shape
    n = tokens // layout.page_tokens
    if layout.kind == "exact":
        parts = [x.contiguous().view(torch.uint8) for x in (k, v)]
    else:
        kd, kr = codes.encode(k, state.key_frame, unbiased=True)
        vd, vr = codes.encode(v, state.value_frame, unbiased=False)
        parts = [codes.pack_digits(kd), codes.pack_digits(vd)]
        parts += [codes.encode_radius(r).unsqueeze(-1) for r in (kr, vr)]
    pages = [x.reshape(batch, heads, n, -1) for x in parts]
    return torch.cat(pages, dim=-1)


def page_field(pages: Tensor, layout: Layout, name: str) -> Tensor:
    """[..., n, page_bytes] -> [..., n * P, bytes a token] of one field."""
    field = layout.fields[name]
    tokens = pages.shape[-2] * layout.page_tokens
    width = field.size // layout.page_tokens
    return pages[..., field.slice].reshape(*pages.shape[:-2], tokens, width)


def decode_pages(pages: Tensor, state: State, layout: Layout) -> tuple[Tensor, Tensor]:
    """[B, H, n, page_bytes] -> dense keys and values [B, H, n * P, D] (never on the fast path)."""
    if layout.kind == "exact":
        dtype = EXACT_DTYPES[layout.dtype]
        k, v = (
            page_field(pages, layout, name).contiguous().view(dtype) for name in ("keys", "values")
        )
        return k, v
    out = []
    for side, frame in (("key", state.key_frame), ("value", state.value_frame)):
        digits = codes.unpack_digits(page_field(pages, layout, f"{side}_digits"))
        radius = codes.decode_radius(page_field(pages, layout, f"{side}_radius")).squeeze(-1)
        out.append(codes.decode(digits, radius, frame))
    return out[0], out[1]


# ---------------------------------------------------------------- append


def visible(mask: Tensor) -> Tensor:
    """Where an attention mask (bool, or additive float) lets a query see a slot."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


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
    bad_position = ((pad + length != start) | ~in_ring).any()

    # Left padding: what precedes the first visible token of an empty row.
    lead = torch.where(valid.any(1), valid.to(torch.int8).argmax(1), tokens)
    lead = torch.where(length == 0, lead, 0)
    new_length = length + tokens - lead

    stored = torch.arange(tokens, device=k.device) >= lead[:, None]
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
        steps = torch.arange(most, device=k.device)
        i = pages[:, None] * layout.page_tokens + torch.arange(
            most * layout.page_tokens, device=k.device
        )
        fresh_pages = encode_pages(*pick(i), state, layout)
        ids = page_ids(batch, heads, layout.max_pages, pages, most)
        write = (steps < due[:, None])[:, None, :] & ~bad
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
            f"This forward writes at slot {int(start)}, but the cache has seen {int(seen[0])} tokens. "
            "A cache is written in order; it may start again at 0 or rewind within the recent "
            "window. Call cache.crop() or cache.reset() first, or give each model its own cache."
        )
    if bad_room:
        raise CapacityError(
            f"The cache was made for {layout.max_tokens} tokens; this forward ends at token "
            f"{int(start) + k.shape[2]}. Make the cache with a larger max_cache_len."
        )


# ---------------------------------------------------------------- attend


class _Softmax:
    """A running softmax over segments of keys; rows are [B, H, G * T]."""

    def __init__(self, rows: tuple[int, ...], like: Tensor) -> None:
        self.top = like.new_full(rows, -torch.inf)
        self.total = like.new_zeros(rows)
        self.sums: dict[str, Tensor] = {}

    def add(self, space: str, logits: Tensor, values: Tensor, factor: Tensor | None) -> None:
        """Add logits [.., n] with values [.., n, E]; ``factor`` [.., n] scales the values."""
        top = torch.maximum(self.top, logits.amax(-1))
        base = torch.where(torch.isfinite(top), top, 0.0)
        shrink = torch.exp(self.top - base)
        p = torch.exp(logits - base.unsqueeze(-1))
        self.total = self.total * shrink + p.sum(-1)
        for name in self.sums:
            self.sums[name] = self.sums[name] * shrink.unsqueeze(-1)
        if factor is not None:
            p = p * factor.unsqueeze(-2)
        out = torch.matmul(p, values)
        self.sums[space] = self.sums[space] + out if space in self.sums else out
        self.top = top

    def result(self, spaces: dict[str, Tensor]) -> Tensor:
        """Sum of all spaces, each through its own map to vectors; 0 where nothing was visible."""
        out = sum(x if name == "exact" else x @ spaces[name] for name, x in self.sums.items())
        return out / torch.where(self.total > 0, self.total, 1.0).unsqueeze(-1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    position: Tensor,
    state: State,
    causal: bool,
    scale: float,
    layout: Layout,
) -> Tensor:
    """Attention of a forward's queries to what is stored and to the forward's own tokens.

    The state is the one BEFORE this forward's ``append``: own keys and values are read
    exactly from ``k`` and ``v``, the past from sinks, ring and pages.

    Args:
        q: [B, Hq, T, D]; k, v: [B, H, T, D], Hq a multiple of H.
        mask: None, bool or additive, [B or 1, Hq or 1, T, S] over the slots of the dense cache.
        position: [T] int64, the slots of this forward's tokens.
        causal: own tokens see only their past, and the forward begins at slot 0.
        scale: of the logits.

    Returns:
        [B, Hq, T, D] in q's dtype. A query that may see nothing gets zeros.
    """
    batch, q_heads, tokens, head_dim = q.shape
    heads = k.shape[1]
    group = q_heads // heads
    math = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = q.to(math).reshape(batch, heads, group * tokens, head_dim) * scale
    if tokens > 1 and causal and not q.is_cuda and int(position[0]) != 0:
        raise SkvError(
            f"is_causal attention at slot {int(position[0])}: with more keys than queries PyTorch "
            "aligns is_causal to the upper left, which hides the cache from the queries. Pass a mask."
        )
    meta = state.meta
    # A forward that starts at slot 0 starts a new sequence; one that rewinds forgets the rest.
    pad = torch.where(position[0] == 0, 0, meta[:, PAD])
    past = torch.minimum(meta[:, LENGTH], (position[0] - pad).clamp(min=0))
    pages = torch.where(position[0] == 0, 0, meta[:, PAGES])

    def masked(logits: Tensor, token: Tensor, live: Tensor) -> Tensor:
        """Apply liveness [B, n] and the mask at the slots of tokens [B, n]."""
        logits = logits.masked_fill(~live[:, None, None, :], -torch.inf)
        if mask is None:
            return logits
        slot = (token + pad[:, None]).clamp(0, mask.shape[-1] - 1)
        full = mask.expand(batch, -1, tokens, -1)
        m = full.gather(-1, slot[:, None, None, :].expand(-1, full.shape[1], tokens, -1))
        return _apply_mask(logits, m, heads, group)

    soft = _Softmax((batch, heads, group * tokens), rows)

    # Pages, from their codes.
    used = layout.max_pages if q.is_cuda else int(pages.max())
    queries = rows if layout.kind == "exact" else rows @ state.key_out.to(math).transpose(-1, -2)
    for first in range(0, used, PAGES_PER_CHUNK):
        count = min(PAGES_PER_CHUNK, used - first)
        begin = torch.full((batch,), first, device=q.device)
        chunk = state.pool[page_ids(batch, heads, layout.max_pages, begin, count)]
        i = first * layout.page_tokens + torch.arange(
            count * layout.page_tokens, device=q.device
        ).expand(batch, -1)
        live = i < pages[:, None] * layout.page_tokens
        token = i + layout.sinks
        if layout.kind == "exact":
            dk, dv = decode_pages(chunk, state, layout)
            # Unused pages are uninitialised memory, and 0 * NaN is NaN.
            dead = ~live[:, None, :, None]
            dk, dv = (x.to(math).masked_fill(dead, 0) for x in (dk, dv))
            logits = queries @ dk.transpose(-1, -2)
            soft.add("exact", masked(logits, token, live), dv, None)
        else:
            kd, vd = (
                codes.unpack_digits(page_field(chunk, layout, name)).to(math) - 1.5
                for name in ("key_digits", "value_digits")
            )
            kr, vr = (
                codes.decode_radius(page_field(chunk, layout, name)).squeeze(-1).to(math)
                for name in ("key_radius", "value_radius")
            )
            logits = (queries @ kd.transpose(-1, -2)) * kr.unsqueeze(-2)
            soft.add("codes", masked(logits, token, live), vd, vr)

    # Sinks and ring, exact.
    i, live = ring_tokens(torch.stack([pad, past, pages, pad], 1), layout)
    t = torch.arange(layout.sinks, device=q.device).expand(batch, -1)
    token = torch.cat([t, i + layout.sinks], 1)
    live = torch.cat([t < past[:, None], live], 1)
    dead = ~live[:, None, :, None]
    ek, ev = (x.to(math).masked_fill(dead, 0) for x in (state.exact_keys, state.exact_values))
    soft.add("exact", masked(rows @ ek.transpose(-1, -2), token, live), ev, None)

    # The forward's own tokens, exact.
    own = rows @ k.to(math).transpose(-1, -2)
    if mask is not None:
        full = mask.index_select(-1, position.clamp(max=mask.shape[-1] - 1)).expand(batch, -1, tokens, -1)
        own = _apply_mask(own, full, heads, group)
    elif causal and tokens > 1:
        keep = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
        own = _apply_mask(own, keep[None, None], heads, group)
    soft.add("exact", own, v.to(math), None)

    spaces = {"codes": state.value_out.to(math)} if layout.kind != "exact" else {}
    out = soft.result(spaces)
    return out.reshape(batch, q_heads, tokens, head_dim).to(q.dtype)


def _apply_mask(logits: Tensor, mask: Tensor, heads: int, group: int) -> Tensor:
    """Mask [B or 1, Hq or 1, T, n] on logits [B, H, G * T, n]."""
    batch, _, rows, n = logits.shape
    shaped = logits.view(batch, heads, group, rows // group, n)
    if mask.shape[1] == 1:
        mask = mask.unsqueeze(2)
    else:
        mask = mask.unflatten(1, (heads, group))
    if mask.dtype == torch.bool:
        shaped = shaped.masked_fill(~mask, -torch.inf)
    else:
        shaped = shaped + mask.to(logits.dtype)
        shaped = shaped.masked_fill(~visible(mask), -torch.inf)
    return shaped.reshape(logits.shape)
