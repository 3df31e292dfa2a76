"""What sampled queries see of a layer's tokens: the evidence that policies judge by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..lowering.layout import Layout
from ..lowering.reference.pages import decode_records
from ..lowering.state import State
from .evidence import Exact, Queries
from .policies.base import Seen
from .tokens import Content, ranks


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
        place, distinct, counts = ranks(group)
        self.most = int(counts.max()) if len(counts) else 0
        self.shape = (batch, heads, self.most)
        local = distinct - first
        self.at = (local * self.most).repeat_interleave(counts) + place

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
    observe: object,
) -> Evidence:
    """Attention of sampled queries to exact and coded tokens, as scores of a policy.

    Args:
        observe: ``Policy.observe``.
    """
    batch, q_heads, n, dim = queries.q.shape
    heads = exact.k.shape[1]
    group = q_heads // heads
    rows = (queries.q.float() * scale).reshape(batch, heads, group * n, dim)

    def causal(i: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs that are visible, and those that count, of tokens [B, h, n]: [B, h, S, n]."""
        distance = queries.i[:, None, :, None] - i[:, :, None, :]
        alive = queries.live[:, None, :, None] & live[:, :, None, :]
        return (distance >= 0) & alive, (distance >= layout.recent) & alive & (i >= 0)[:, :, None]

    logits, seen, counted, values, padded = [], [], [], [], []
    keys = exact.k.float()
    visible, counts = causal(exact.i[:, None], exact.live[:, None])
    logits.append(rows @ keys.mT)
    seen.append(visible.expand(-1, heads, -1, -1))
    counted.append(counts)
    values.append(exact.v.float())
    for tier, (tokens, records) in enumerate(zip(content.tokens, content.records, strict=True)):
        fold = Padded(tokens.group, first_group, batch, heads)
        padded.append(fold)
        if fold.most == 0:
            continue
        i = fold.pad(tokens.i)
        live = fold.pad(torch.ones_like(tokens.i, dtype=torch.bool))
        fields = {name: fold.pad(x) for name, x in records.items()}
        k, v = decode_records(fields, i, state, layout, tier)
        visible, counts = causal(i, live)
        logits.append(rows @ k.float().mT)
        seen.append(visible)
        counted.append(counts)
        values.append(v.float())
    sizes = [x.shape[-1] for x in logits]
    weights = torch.cat(logits, -1).unflatten(2, (group, n))
    weights = weights.masked_fill(~torch.cat(seen, -1)[:, :, None], -torch.inf)
    weights = torch.nan_to_num(weights.softmax(-1))
    out = (weights.flatten(2, 3) @ torch.cat(values, 2)).unflatten(2, (group, n))

    scores = []
    for a, pairs in zip(weights.split(sizes, -1), counted, strict=True):
        scores.append(_score(observe, a, pairs, prompt))
    parts, coded = iter(scores[1:]), []
    for fold in padded:
        coded.append(fold.flat(next(parts)) if fold.most else rows.new_zeros(0))
    # Means over the queries that are there.
    live = queries.live[:, None, None, :, None].float()
    total = (live.sum((2, 3, 4)) * group).clamp(min=1)
    centre = state.value_back[:, -1].float() if state.value_back.numel() else out.new_zeros(())
    moved = out - (centre[:, None, None] if centre.dim() else centre)
    energy = queries.q.float().reshape(batch, heads, group, n, dim).square()
    means = [(x * live).sum((2, 3, 4)) / total for x in (energy, out.square(), moved.square())]
    return Evidence(coded, scores[0], *means)


def _score(observe, weights: Tensor, counted: Tensor, prompt: bool) -> Tensor:
    """Scores [B, H, n]; ``counted`` [B, 1 or H, S, n] is the same for a row's heads or each its
    own."""
    batch, heads = weights.shape[:2]
    if counted.shape[1] == heads and heads > 1:
        flat = Seen(weights.flatten(0, 1)[:, None], counted.flatten(0, 1), prompt)
        return observe(flat)[:, 0].unflatten(0, (batch, heads))
    return observe(Seen(weights, counted[:, 0], prompt))
