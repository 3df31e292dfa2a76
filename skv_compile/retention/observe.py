"""What sampled queries see of a layer's tokens: the evidence that policies judge by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..lowering.layout import Layout
from ..lowering.reference.pages import decode_records
from ..lowering.state import State
from .evidence import Exact, Queries, Whole
from .policies.base import Seen
from .tokens import Content, runs

Observe = Callable[[Seen], Tensor]  # ``Policy.observe``

CHUNK_BYTES = 1 << 28  # of attention weights at once


@dataclass
class Evidence:
    """``coded``: of each tier's tokens, observed scores [n_t] or None. ``exact`` [B, H, n]."""

    coded: list[Tensor]
    exact: Tensor
    query_energy: Tensor
    norm: Tensor
    spread: Tensor


class Padded:
    """Flat tokens of one layer's groups as [B, H, n], and back."""

    def __init__(self, group: Tensor, first: int, batch: int, heads: int) -> None:
        found = runs(group)
        self.most = int(found.count.max()) if len(group) else 0
        self.shape = (batch, heads, self.most)
        self.at = (group - first) * self.most + found.place

    def pad(self, x: Tensor) -> Tensor:
        """[J, ...] -> [B, H, n, ...], zeros where there is no token."""
        batch, heads, n = self.shape
        out = x.new_zeros(batch * heads * n, *x.shape[1:])
        out[self.at] = x
        return out.view(*self.shape, *x.shape[1:])

    def flat(self, x: Tensor) -> Tensor:
        """[B, H, n] -> [J]."""
        return x.reshape(-1)[self.at]


def look(
    queries: Queries,
    exact: Exact,
    content: Content,
    first_group: int,
    state: State,
    layout: Layout,
    scale: float,
    prompt: bool,
    observe: Observe,
) -> Evidence:
    """Attention of sampled queries to exact and coded tokens, as scores of a policy.

    Args:
        observe: ``Policy.observe``.
    """
    batch, heads = exact.k.shape[:2]
    parts = [_Part(exact.k, exact.v, exact.i[:, None], exact.live[:, None])]
    padded = []
    for tier, (tokens, records) in enumerate(zip(content.tokens, content.records, strict=True)):
        fold = Padded(tokens.group, first_group, batch, heads)
        padded.append(fold)
        if fold.most:
            i, live = fold.pad(tokens.i), fold.pad(torch.ones_like(tokens.i, dtype=torch.bool))
            fields = {name: fold.pad(x) for name, x in records.items()}
            parts.append(_Part(*decode_records(fields, i, state, layout, tier), i, live))
    rows = (queries.q.float() * scale).unflatten(1, (heads, -1))  # [B, H, G, S, D]
    pairs = rows[:, 0, :, :, 0].numel() * sum(part.i.shape[-1] for part in parts)
    size = max(1, CHUNK_BYTES // max(1, 4 * pairs))
    found = [
        _attention(rows[:, some], [p.heads(some) for p in parts], queries, layout, prompt, observe)
        for some in (slice(first, first + size) for first in range(0, heads, size))
    ]
    out = torch.cat([x[0] for x in found], 1)
    scores = iter([torch.cat(x, 1) for x in zip(*(x[1] for x in found), strict=True)])
    of_exact = next(scores)
    coded = [fold.flat(next(scores)) if fold.most else rows.new_zeros(0) for fold in padded]
    return Evidence(coded, of_exact, *_means(queries, out, state))


class _Part(NamedTuple):
    """Tokens i where live [B, H or 1, n] and their vectors [B, H, n, D]."""

    k: Tensor
    v: Tensor
    i: Tensor
    live: Tensor

    def heads(self, some: slice) -> _Part:
        return _Part(*(x if x.shape[1] == 1 else x[:, some] for x in self))


def _attention(
    rows: Tensor,
    parts: list[_Part],
    queries: Queries,
    layout: Layout,
    prompt: bool,
    observe: Observe,
) -> tuple[Tensor, list[Tensor]]:
    """Outputs [B, h, G, S, D] of some heads' queries, and the scores of each part."""
    weights, counted = _weights(rows, parts, queries, layout)
    out = weights @ _joined([part.v.float() for part in parts], 2)[:, :, None]
    pairs = zip(weights.split([x.shape[-1] for x in counted], -1), counted, strict=True)
    return out, [_score(observe, a, c, prompt) for a, c in pairs]


def _weights(
    rows: Tensor, parts: list[_Part], queries: Queries, layout: Layout
) -> tuple[Tensor, list[Tensor]]:
    """Attention weights [B, h, G, S, n] of all parts' tokens, one part after another, and of every
    part the pairs that count [B, 1 or h, S, n]."""
    logits, counted = [], []
    for part in parts:
        distance = queries.i[:, None, :, None] - part.i[:, :, None]
        alive = queries.live[:, None, :, None] & part.live[:, :, None]
        counted.append((distance >= layout.recent) & alive & (part.i >= 0)[:, :, None])
        seen = ((distance >= 0) & alive)[:, :, None]
        logits.append((rows @ part.k.float().mT[:, :, None]).masked_fill_(~seen, -torch.inf))
    joined = _joined(logits, -1)
    del logits
    return joined.softmax(-1).nan_to_num_(), counted


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    """``torch.cat`` that does not copy a single one."""
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def _means(queries: Queries, out: Tensor, state: State) -> list[Tensor]:
    """Means over the queries that are there: of |q|^2, |o|^2 and |o - centre|^2, [B, H] each.

    ``out``: attention outputs [B, H, G, S, D].
    """
    heads, group = out.shape[1:3]
    live = queries.live[:, None, None, :, None].float()
    total = (live.sum((2, 3, 4)) * group).clamp(min=1)
    centre = state.value_back[:, -1].float() if state.value_back.numel() else out.new_zeros(())
    moved = out - (centre[:, None, None] if centre.dim() else centre)
    energy = queries.q.float().unflatten(1, (heads, group)).square()
    return [(x * live).sum((2, 3, 4)) / total for x in (energy, out.square(), moved.square())]


def _score(observe: Observe, weights: Tensor, counted: Tensor, prompt: bool) -> Tensor:
    """Scores [B, H, n]; ``counted`` [B, 1 or H, S, n] is the same for a row's heads or each its
    own."""
    batch, heads = weights.shape[:2]
    if counted.shape[1] == heads and heads > 1:
        flat = Seen(weights.flatten(0, 1)[:, None], counted.flatten(0, 1), prompt)
        return observe(flat)[:, 0].unflatten(0, (batch, heads))
    return observe(Seen(weights, counted[:, 0], prompt))


# ------------------------------------------------------------ a prompt on kernels


class Summed(Seen):
    """What queries see, as sums over them; the weights themselves are made when asked for.

    Args:
        sums: of weights and of their squares, and the largest: [B, H, n] each.
        counts: [B, n] queries that count. ``group``, ``queries``: of each kv head.
        whole: makes the weights and which pairs count.
    """

    def __init__(
        self,
        sums: Sequence[Tensor],
        counts: Tensor,
        group: int,
        queries: int,
        whole: Callable[[], Seen],
    ) -> None:
        self.prompt = True
        self._sums, self._counts = sums, counts
        self._shape, self._make = (group, queries), whole

    @cached_property
    def _whole(self) -> Seen:
        return self._make()

    @property
    def weights(self) -> Tensor:
        return self._whole.weights

    @property
    def counted(self) -> Tensor:
        return self._whole.counted

    @property
    def counts(self) -> Tensor:
        return self._counts

    @property
    def shape(self) -> tuple[int, int, int]:
        return *self._shape, self._counts.shape[-1]

    def total(self, power: int = 1) -> Tensor:
        return self._sums[power - 1] if power in (1, 2) else super().total(power)

    def most(self) -> Tensor:
        return self._sums[2]


def look_at_prompt(
    queries: Queries,
    prompt: Whole,
    state: State,
    layout: Layout,
    scale: float,
    observe: Observe,
) -> Evidence:
    """:func:`look` of a forward that begins a sequence, by kernels: no attention weights are
    written, unless the policy asks for them."""
    from ..lowering.sampled import Sampled

    k, v, lead = prompt.k, prompt.v, prompt.lead
    heads, tokens = k.shape[1:3]
    n = tokens - prompt.least  # tokens of the longest row: policies take means over them
    q = queries.q.unflatten(1, (heads, -1))
    group, asked = q.shape[2:4]
    number = torch.where(queries.live, queries.i + layout.sinks, -1)
    found = Sampled(q, k, v, lead, number, scale, layout)
    sums = found.scores()
    t = torch.arange(n, device=k.device)
    before = torch.searchsorted(number, (t + layout.recent).repeat(len(k), 1))
    there = (t >= layout.sinks) & (t < tokens - lead[:, None])
    counts = (asked - before).masked_fill(~there, 0)
    size = max(1, CHUNK_BYTES // max(1, 4 * len(k) * group * asked * n))
    scores = []
    for some in (slice(first, first + size) for first in range(0, heads, size)):
        whole = partial(_seen, queries, prompt, some, layout, scale)
        mine = [x[:, some, :n] for x in sums]
        scores.append(observe(Summed(mine, counts, group, asked, whole)))
    nothing = [k.new_zeros(0, dtype=torch.float32)] * len(layout.tiers)
    return Evidence(nothing, torch.cat(scores, 1), *_means(queries, found.out.float(), state))


def _seen(queries: Queries, prompt: Whole, some: slice, layout: Layout, scale: float) -> Seen:
    """What :func:`look_at_prompt` has only the sums of, for some heads."""
    k, lead = prompt.k, prompt.lead
    heads, tokens = k.shape[1:3]
    t = torch.arange(tokens - prompt.least, device=k.device)
    at = (t + lead[:, None]).clamp(max=tokens - 1)[:, None, :, None]
    keys = k[:, some].gather(2, at.expand(-1, k[0, some].shape[0], -1, k.shape[3]))
    there = (t < tokens - lead[:, None])[:, None]
    part = _Part(torch.nan_to_num(keys), keys, (t - layout.sinks).expand_as(there), there)
    rows = (queries.q.float() * scale).unflatten(1, (heads, -1))[:, some]
    weights, (counted,) = _weights(rows, [part], queries, layout)
    return Seen(weights, counted[:, 0], True)
