"""The tokens that have gathered the most attention so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..heads import Heads
from ..tokens import Tokens
from .base import Policy, Seen, one_tier, ordered


@dataclass(frozen=True)
class H2O(Policy):
    """H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models
    (Zhenyu Zhang et al., 2023).

    A token's score is the sum of the attention it has had from all queries so far, and every head
    keeps those with the largest sums, as many as its equal part of the pages holds. Here 256
    queries spread over the prompt stand for all of its queries, and while decoding 16 of every 64;
    each counts for as many as it stands for. Of a later forward of several tokens the last 512
    queries are looked at. Unlike in the paper, queries that have a token in their exact window
    add nothing to it, that window stands for the half of the budget that the paper gives to recent
    tokens, tokens go once every 64 steps instead of one a step, and kept ones are coded in the
    finest tier instead of 16 bits. A score rests in 8 bits of a fifth of an octave, so an addition
    of less than 7 % of it is lost.
    """

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = (
        "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models "
        "(Zhenyu Zhang et al., 2023)"
    )
    queries: ClassVar[str] = "spread"
    scope: ClassVar[str] = "group"

    every: float = 4.0
    """Queries that each of those kept while decoding stands for."""

    def observe(self, seen: Seen) -> Tensor:
        group, queries, tokens = seen.shape
        # A prompt has as many queries as tokens.
        stands_for = max(1.0, tokens / max(1, queries)) if seen.prompt else self.every
        return stands_for * seen.total() / group

    def update(self, old: Tensor, observed: Tensor) -> Tensor:
        return old + observed

    def steps(self, tokens: Tokens, heads: Heads, memo: dict[Any, Any]) -> Tensor:
        return one_tier(ordered(tokens.score, tokens), heads)
