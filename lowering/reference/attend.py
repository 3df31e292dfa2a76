"""``attend`` in plain PyTorch: the specification of ``skv::attend``.

As in ``append``, no value is read on an accelerator.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import codes
from ..errors import SkvError
from ..layout import Layout
from ..prompt import on_kernels
from ..state import BASE, CODED, KIND, LENGTH, PAD, PER_TIER, State, ring_tokens
from ..turn import block_start, turn
from .masks import apply_mask, mask_at, visible
from .pages import Records, decode_records, page_records, page_tokens, unit_codes

TOKENS_PER_CHUNK = 2048  # bounds the dense working set of the reference
ROWS_FROM_CODES = 16  # more queries than these read turned keys
COLUMNS = 256  # blocks times queries up to which every code meets the queries of all blocks


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
        if factor is None:
            out = torch.matmul(p, values)
        else:  # codes, and the weight that their centre will have
            coded = torch.matmul(p * factor.unsqueeze(-2), values)
            out = torch.cat([coded, p.sum(-1, keepdim=True)], -1)
        self.sums[space] = self.sums[space] + out if space in self.sums else out
        self.top = top

    def result(self, spaces: dict[str, Tensor]) -> Tensor:
        """Sum of all spaces, each through its own map to vectors; 0 where nothing was visible."""
        out = sum(x if name == "exact" else x @ spaces[name] for name, x in self.sums.items())
        return out / torch.where(self.total > 0, self.total, 1.0).unsqueeze(-1)


def code_logits(
    rows: Tensor, records: Records, i: Tensor, state: State, layout: Layout, tier: int
) -> Tensor:
    """Logits [B, H, R, n] of queries [B, H, R, D] against codes (fields [B, H, n, w]) of tokens i.

    The queries are turned by every block that a token is of, and go through the transform once
    for all tiers; what is left is one product of digits for each token.
    """
    frame = state.frames(layout, tier)[0]
    blocks = i // layout.block if layout.block else torch.zeros_like(i)
    first, last = 0, (layout.max_coded - 1) // layout.block if layout.block else 0
    if not rows.is_cuda:
        first, last = int(blocks.min()), int(blocks.max())
    queries = rows.unsqueeze(2)  # [B, H, blocks or 1, R, D]
    if layout.block:
        number = torch.arange(first, last + 1, device=rows.device)
        by = -block_start(number * layout.block, layout)
        queries = turn(queries, by[:, None], state.turn)
    back = frame.back.to(rows.dtype)
    through = queries @ back.mT.unsqueeze(1)
    spread = frame.spread(through[..., :-1].transpose(1, 2)).transpose(1, 2)
    page_term = through[..., -1]  # [B, H, blocks, R]
    digits = unit_codes(records["key_digits"], layout, tier).to(rows.dtype)
    radius = codes.decode_radius(records["key_radius"]).to(rows.dtype)
    at = (blocks - first).clamp(0, last - first)[..., None]
    heads, count, width = digits.shape[1], spread.shape[2], spread.shape[3]
    page = page_term.gather(2, at.expand(-1, heads, -1, width))
    if count * width <= COLUMNS:  # against every block, and of that the token's own
        every = digits @ spread.flatten(2, 3).mT
        own = at.unsqueeze(-1).expand(-1, heads, -1, -1, width)
        logits = every.unflatten(-1, (count, width)).gather(3, own).squeeze(3)
    else:
        own = spread.flatten(3).gather(2, at.expand(-1, heads, -1, spread[0, 0, 0].numel()))
        logits = (own.unflatten(-1, spread.shape[3:]) @ digits.unsqueeze(-1)).squeeze(-1)
    return (logits * radius + page).mT


def pages_by_tier(
    state: State, layout: Layout, coded: Tensor, read: bool
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Of every tier, pool rows [B, H, n] of its pages, and which of them are there [B, H, n].

    Pages that begin at ``coded`` [B] or later are not.

    With ``read``, which waits for the device, tiers and chunks that nobody uses are left out.
    """
    used = state.table >= 0
    ids = torch.where(used, state.table, 0).long()
    info = state.info[ids]
    used = used & (info[..., BASE] < coded[:, None, None])
    tier_of = info[..., KIND] // PER_TIER
    for tier in range(len(layout.tiers)):
        own = used & (tier_of == tier)
        most = layout.max_pages
        if read and own.numel():
            most = int(own.sum(-1).max())
        order = (~own).to(torch.uint8).argsort(dim=-1, stable=True)[..., :most]
        sorted_ids, there = ids.gather(-1, order), own.gather(-1, order)
        pages = max(1, TOKENS_PER_CHUNK // layout.capacity[tier])
        for first in range(0, most, pages):
            part = slice(first, first + pages)
            yield tier, sorted_ids[..., part], there[..., part]


def attend_first(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    position: Tensor,
    causal: bool,
    scale: float,
) -> Tensor:
    """``attend`` of a forward that begins a sequence: there is nothing stored to look at."""
    tokens, group = q.shape[2], q.shape[1] // k.shape[1]
    # Flash attention, which takes no mask, repeats heads by itself; others would by copies.
    flash = q.dtype in (torch.float16, torch.bfloat16) and torch.backends.cuda.flash_sdp_enabled()
    if mask is None and flash and on_kernels(q):
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=group > 1
        )
        return out.contiguous()
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    if mask is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
        return out.contiguous()
    own = mask.index_select(-1, position.clamp(max=mask.shape[-1] - 1))
    own = own if own.dtype == torch.bool else own.to(q.dtype)
    seen = visible(own).any(-1, keepdim=True)
    if own.dtype == torch.bool:
        own = own | ~seen  # a row that sees nothing would be NaN
    out = F.scaled_dot_product_attention(q, k, v, own.expand(-1, -1, tokens, -1), scale=scale)
    return torch.where(seen, out, 0).contiguous()


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
    if tokens > 1 and int(position[0]) == 0:  # forwards of several tokens are never captured
        return attend_first(q, k, v, mask, position, causal, scale)
    math = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = q.to(math).reshape(batch, heads, group * tokens, head_dim) * scale
    if tokens > 1 and causal:
        raise SkvError(
            f"is_causal attention at slot {int(position[0])}: PyTorch aligns is_causal to the "
            "upper left, which hides the cache from the queries. Pass a mask."
        )
    meta = state.meta
    # A forward that starts at slot 0 starts a new sequence; one that rewinds forgets the rest.
    pad = torch.where(position[0] == 0, 0, meta[:, PAD])
    past = torch.minimum(meta[:, LENGTH], (position[0] - pad).clamp(min=0))
    coded = torch.where(position[0] == 0, 0, meta[:, CODED])

    def masked(logits: Tensor, token: Tensor, live: Tensor) -> Tensor:
        """Apply liveness and the mask at the slots of tokens, both [B, H, n]."""
        logits = logits.masked_fill(~live[:, :, None, :], -torch.inf)
        if mask is None:
            return logits
        slot = (token + pad[:, None, None]).clamp(0, mask.shape[-1] - 1)
        return apply_mask(logits, mask_at(mask, slot, tokens, group), heads, group)

    soft = _Softmax((batch, heads, group * tokens), rows)
    spaces: dict[str, Tensor] = {}

    # Pages, from their codes.
    for tier, ids, there in pages_by_tier(state, layout, coded, tokens > 1 or not q.is_cuda):
        records = page_records(state.pool[ids], layout, tier)
        i, live = page_tokens(records, state.info[ids], layout, tier)
        live = live & there[..., None] & (i < coded[:, None, None, None])
        i, live = torch.where(live, i, 0).flatten(2), live.flatten(2)
        records = {name: x.flatten(2, 3) for name, x in records.items()}
        token = i + layout.sinks
        if layout.kind == "exact":
            dk, dv = decode_records(records, i, state, layout, tier)
            # Unused pages are uninitialised memory, and 0 * NaN is NaN.
            dead = ~live[..., None]
            dk, dv = (x.to(math).masked_fill(dead, 0) for x in (dk, dv))
            soft.add("exact", masked(rows @ dk.mT, token, live), dv, None)
            continue
        if rows.shape[2] <= ROWS_FROM_CODES:
            logits = code_logits(rows, records, i, state, layout, tier)
        else:  # many queries: turning the keys is less work
            logits = rows @ decode_records(records, i, state, layout, tier)[0].to(math).mT
        vd = unit_codes(records["value_digits"], layout, tier).to(math)
        vr = codes.decode_radius(records["value_radius"]).squeeze(-1).to(math)
        soft.add(f"tier {tier}", masked(logits, token, live), vd, vr)
        spaces[f"tier {tier}"] = state.frames(layout, tier)[1].out.to(math)

    # Sinks and ring, exact.
    before = torch.stack([pad, past, coded, pad], 1)
    i, live = ring_tokens(before, layout)
    t = torch.arange(layout.sinks, device=q.device).expand(batch, -1)
    token = torch.cat([t, i + layout.sinks], 1)[:, None].expand(-1, heads, -1)
    live = torch.cat([t < past[:, None], live], 1)[:, None].expand(-1, heads, -1)
    dead = ~live[..., None]
    ek, ev = (x.to(math).masked_fill(dead, 0) for x in (state.exact_keys, state.exact_values))
    soft.add("exact", masked(rows @ ek.mT, token, live), ev, None)

    # The forward's own tokens, exact.
    own = rows @ k.to(math).mT
    if mask is not None:
        full = mask.index_select(-1, position.clamp(max=mask.shape[-1] - 1)).expand(
            batch, -1, tokens, -1
        )
        own = apply_mask(own, full, heads, group)
    soft.add("exact", own, v.to(math), None)

    out = soft.result(spaces)
    return out.reshape(batch, q_heads, tokens, head_dim).to(q.dtype)
