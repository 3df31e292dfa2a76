"""Which queries are looked at, and the exact tokens that they see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..lowering.layout import Layout
from ..lowering.reference.append import pick_new
from ..lowering.reference.intake import Intake, Sources
from ..lowering.state import CODED, LENGTH, State, ring_tokens

LAST = 512  # queries of a forward that are looked at: the last ones,
SPREAD = 256  # or some spread over all of it


@dataclass
class Queries:
    """Sampled queries ``q`` [B, Hq, S, D] of the tokens ``i`` [B, S] (counted from the first
    after the sinks), where ``live`` [B, S]."""

    q: Tensor
    i: Tensor
    live: Tensor


@dataclass
class Whole:
    """All tokens of a forward that begins a sequence, as they came: ``k``, ``v`` [B, H, T, D].

    Token t, sinks included, stands at ``lead`` [B] + t; ``least`` is the least of them.
    """

    k: Tensor
    v: Tensor
    lead: Tensor
    least: int

    def pick(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, n, D] of tokens t [n] or [B, n]; past the end, the last one."""
        at = (t + self.lead[:, None]).clamp(max=self.k.shape[2] - 1)
        at = at[:, None, :, None].expand(-1, self.k.shape[1], -1, self.k.shape[3])
        return self.k.gather(2, at), self.v.gather(2, at)

    def exact(self, layout: Layout) -> Exact:
        """All of them as exact tokens."""
        tokens = self.k.shape[2]
        t = torch.arange(tokens - self.least, device=self.k.device).expand(len(self.lead), -1)
        return Exact(*self.pick(t), t - layout.sinks, t < tokens - self.lead[:, None])


@dataclass
class Exact:
    """Tokens that are still exact: ``k``, ``v`` [B, H, n, D] of ``i`` [B, n] where ``live``.

    The sinks come first, at negative i.
    """

    k: Tensor
    v: Tensor
    i: Tensor
    live: Tensor

    @staticmethod
    def of_forward(sources: Sources, found: Intake, state: State, layout: Layout) -> Exact:
        """Of a forward: sinks, what the ring held, and the forward's own; i is the place."""
        k, v = sources.k, sources.v
        batch = k.shape[0]
        t = torch.arange(layout.sinks, device=k.device).expand(batch, -1)
        new = pick_new(k, v, t - found.length[:, None] + found.lead[:, None])
        is_old = (t < found.length[:, None])[:, None, :, None]
        sinks = [
            torch.where(is_old, exact[:, :, : layout.sinks], x)
            for exact, x in zip((state.exact_keys, state.exact_values), new, strict=True)
        ]
        n = max(0, int(found.new_length.max()) - layout.sinks)
        i = torch.arange(n, device=k.device).expand(batch, -1)
        live = (i >= found.coded[:, None]) & (i < found.new_length[:, None] - layout.sinks)
        rest = sources.pick(torch.where(live, i, found.coded[:, None]))
        keys, values = (torch.cat(pair, 2) for pair in zip(sinks, rest, strict=True))
        live = torch.cat([t < found.new_length[:, None], live], 1)
        return Exact(keys, values, torch.cat([t - layout.sinks, i], 1), live)


def forward_queries(q: Tensor, found: Intake, layout: Layout, way: str) -> Queries:
    """Of a forward's queries [B, Hq, T, D], the last ones or some spread over it; ``""``: none."""
    tokens = q.shape[2]
    if way == "spread":
        count = min(SPREAD, tokens)
        index = torch.linspace(0, tokens - 1, count, device=q.device).round().long()
    else:
        count = min(LAST, tokens) if way else 0
        index = torch.arange(tokens - count, tokens, device=q.device)
    i = found.new_length[:, None] - layout.sinks - tokens + index
    return Queries(q[:, :, index], i, i >= -layout.sinks)


def ring_queries(state: State, layout: Layout) -> tuple[Queries, Exact]:
    """The queries kept with the ring (``lowering.reference.retain``), and all exact tokens."""
    meta = state.meta
    ring, live = ring_tokens(meta, layout)
    t = torch.arange(layout.sinks, device=meta.device).expand(len(meta), -1)
    i = torch.cat([t - layout.sinks, ring], 1)
    exact = Exact(
        state.exact_keys, state.exact_values, i, torch.cat([t < meta[:, LENGTH, None], live], 1)
    )
    if layout.observed == 0:
        return Queries(state.queries, i[:, :0], live[:, :0]), exact
    number, live = kept_numbers(meta[:, LENGTH] - layout.sinks, layout)
    live = live & (number >= meta[:, CODED, None])
    return Queries(state.queries, number, live), exact


def waiting(state: State, end: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens of a ring that are due, up to ``end`` [B] of every row: k, v [B, H, n, D], i [B, n],
    live [B, n]."""
    meta = state.meta
    n = int((end - meta[:, CODED]).max())
    i = meta[:, CODED, None] + torch.arange(n, device=meta.device)
    slots = layout.sinks + i % layout.ring
    heads = state.exact_keys.shape[1]
    at = slots[:, None, :, None].expand(-1, heads, -1, layout.head_dim)
    k, v = state.exact_keys.gather(2, at), state.exact_values.gather(2, at)
    return k, v, i, i < end[:, None]


def kept_numbers(count: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """After ``count`` [B] tokens: which i each slot of kept queries has, and whether it has one."""
    every = layout.stride // layout.observed
    slot = torch.arange(layout.observed, device=count.device)
    last = count[:, None] // every - 1  # number of the last one kept
    number = last - (last - slot) % layout.observed
    return number * every + every - 1, number >= 0


def kept_queries(q: Tensor, found: Intake, state: State, layout: Layout) -> None:
    """Keep those of a forward's queries [B, Hq, T, D] that ``retain`` would have kept."""
    tokens = q.shape[2]
    i, live = kept_numbers(found.new_length - layout.sinks, layout)
    index = i - (found.new_length[:, None] - layout.sinks - tokens)
    take = (live & (index >= 0))[:, None, :, None]
    at = index.clamp(0, tokens - 1)[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    state.queries.copy_(torch.where(take, q.gather(2, at), state.queries))
