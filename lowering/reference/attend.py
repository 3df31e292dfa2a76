"""``attend`` in plain PyTorch: the specification of ``skv::attend``.

As in ``append``, no value is read on an accelerator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import codes
from ..errors import SkvError
from ..layout import Layout
from ..state import LENGTH, PAD, PAGES, State, page_ids, ring_tokens
from ..turn import block_start, turn
from .masks import apply_mask
from .pages import decode_pages, page_field, unit_codes

PAGES_PER_CHUNK = 32  # bounds the dense working set of the reference


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
    rows: Tensor, pages: Tensor, numbers: Tensor, state: State, layout: Layout
) -> Tensor:
    """Logits [B, H, R, n * P] of queries [B, H, R, D] against the codes of pages number [n]."""
    batch, heads, _, _ = rows.shape
    queries = rows.unsqueeze(2)
    if layout.block:
        by = -block_start(numbers, layout)
        queries = turn(queries, by[:, None], state.turn)
    through = queries @ state.key_out.to(rows.dtype).mT.unsqueeze(1)  # [B, H, n or 1, R, N + 1]
    shape = (batch, heads, len(numbers), layout.page_tokens, -1)
    digits = unit_codes(page_field(pages, layout, "key_digits"), layout).view(shape)
    radius = codes.decode_radius(page_field(pages, layout, "key_radius")).view(shape)
    logits = (through[..., :-1] @ digits.to(rows.dtype).mT) * radius.to(rows.dtype).mT
    return (logits + through[..., -1:]).transpose(2, 3).flatten(3)


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
            f"is_causal attention at slot {int(position[0])}: PyTorch aligns is_causal to the "
            "upper left, which hides the cache from the queries. Pass a mask."
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
        return apply_mask(logits, m, heads, group)

    soft = _Softmax((batch, heads, group * tokens), rows)

    # Pages, from their codes.
    used = layout.max_pages if q.is_cuda else int(pages.max())
    for first in range(0, used, PAGES_PER_CHUNK):
        count = min(PAGES_PER_CHUNK, used - first)
        begin = torch.full((batch,), first, device=q.device)
        chunk = state.pool[page_ids(batch, heads, layout.max_pages, begin, count)]
        i = first * layout.page_tokens + torch.arange(
            count * layout.page_tokens, device=q.device
        ).expand(batch, -1)
        live = i < pages[:, None] * layout.page_tokens
        token = i + layout.sinks
        numbers = first + torch.arange(count, device=q.device)
        if layout.kind == "exact":
            dk, dv = decode_pages(chunk, numbers[None], state, layout)
            # Unused pages are uninitialised memory, and 0 * NaN is NaN.
            dead = ~live[:, None, :, None]
            dk, dv = (x.to(math).masked_fill(dead, 0) for x in (dk, dv))
            soft.add("exact", masked(rows @ dk.transpose(-1, -2), token, live), dv, None)
            continue
        if rows.shape[2] <= layout.page_tokens:
            logits = code_logits(rows, chunk, numbers, state, layout)
        else:  # more queries than tokens in a page: turning the keys is less work
            logits = rows @ decode_pages(chunk, numbers[None], state, layout)[0].to(math).mT
        vd = unit_codes(page_field(chunk, layout, "value_digits"), layout).to(math)
        vr = codes.decode_radius(page_field(chunk, layout, "value_radius")).squeeze(-1).to(math)
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
        full = mask.index_select(-1, position.clamp(max=mask.shape[-1] - 1)).expand(
            batch, -1, tokens, -1
        )
        own = apply_mask(own, full, heads, group)
    elif causal and tokens > 1:
        keep = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
        own = apply_mask(own, keep[None, None], heads, group)
    soft.add("exact", own, v.to(math), None)

    spaces = {"codes": state.value_out.to(math)} if layout.kind != "exact" else {}
    out = soft.result(spaces)
    return out.reshape(batch, q_heads, tokens, head_dim).to(q.dtype)
