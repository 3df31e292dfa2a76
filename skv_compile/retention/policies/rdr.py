"""Rate-distortion retention: every token of every head at the level it is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..allocate import steps_of
from ..heads import Heads
from ..tokens import Tokens
from .base import ARRIVING, Policy, Seen, pool_tokens

LARGEST_EXPONENT = 20.0
LEAST_SCORE = 2.0**-48  # what nobody looked at still fills a pool that has room


@dataclass(frozen=True)
class RDR(Policy):
    """One multiplier over all layers, heads and tokens (after the idea of Spherical KV).

    With attention weight a, output o, and a = E[a^2] over recent queries that read the code, the
    expected squared error of a head's output, over E|o|^2, that a tier costs a token is

        E[a^2] (|dv|^2 + |v - o|^2 (exp(E[dl^2]) - 1))

    for an error dv of its value and dl of its logit, both measured when the frames were fitted
    (``State.loss``); dropping it costs ``drop`` times E[a^2] |v - o|^2. The level that minimises
    cost + multiplier * bytes is taken.
    """

    name: ClassVar[str] = "rdr"
    paper: ClassVar[str] = "Spherical KV: rate-distortion retention"
    queries: ClassVar[str] = "last"

    drop: float = 8.0
    """Weight of the error of a dropped token, whose share of attention goes to the others."""
    pool: int = 1
    """Neighbours over which a prompt's scores are averaged."""
    prompt_floor: float = 0.01
    """Of the mean score of a prompt's tokens, added to each."""
    peak: float = 0.003
    """Of the most that any query gave a prompt's tokens, their mean, added to each: a head that
    looks sharply, wherever it looks, may look anywhere at the next question."""
    surprise: float = 0.01
    """Of the head's unexpected attention, added to every token's score (``Heads.surprise``)."""
    switch: float = 0.5
    """Bits per coordinate that a change of tier must save, beyond what it loses."""

    def observe(self, seen: Seen) -> Tensor:
        score = seen.average(2)
        if seen.prompt:
            score = pool_tokens(score, self.pool)
            floor = self.prompt_floor * score + self.peak * seen.most().square()
            score = score + floor.mean(-1, keepdim=True)
        return score

    def costs(self, tokens: Tokens, heads: Heads) -> Tensor:
        """Cost [J, tiers + 1] of every level."""
        head = heads.head(tokens.group)
        score = tokens.score + self.surprise * heads.surprise[tokens.group] + LEAST_SCORE
        score = score / heads.norm[tokens.group].clamp(min=1e-30)
        value, key = tokens.value_radius.square(), tokens.key_radius.square()
        # A code's radius is fitted to its tier; what counts is the vector's own.
        tier = (tokens.level - 1).clamp(min=0)
        value = torch.where(tokens.fresh, value, value / heads.value_size[head, tier])
        key = torch.where(tokens.fresh, key, key / heads.key_size[head, tier])
        away = value * heads.value_energy[head] + heads.spread[tokens.group]
        logit = heads.scale**2 * heads.query_energy[tokens.group] * key
        logit = (logit[:, None] * heads.key_loss[head]).clamp(max=LARGEST_EXPONENT)
        cost = value[:, None] * heads.value_loss[head] + away[:, None] * torch.expm1(logit)
        cost = torch.minimum(cost, self.drop * away[:, None])
        return score[:, None] * torch.cat([self.drop * away[:, None], cost], 1)

    def steps(self, tokens: Tokens, heads: Heads, memo: dict[Any, Any]) -> Tensor:
        cost = self.costs(tokens, heads)
        size = heads.sizes(cost.device).expand_as(cost).clone()
        level = torch.arange(cost.shape[1], device=cost.device)
        above = level > tokens.level[:, None]
        below = (level < tokens.level[:, None]) & ~tokens.fresh[:, None]
        if not memo.get(ARRIVING):  # layers that have just come go where they belong
            size += below * (self.switch * 2 * heads.layout.head_dim / 8)
        return steps_of(cost.masked_fill(above, torch.inf), size)
