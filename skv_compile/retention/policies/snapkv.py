"""What the end of the prompt looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..heads import Heads
from ..tokens import Tokens
from .base import Policy, Seen, one_tier, ordered, pool_tokens


@dataclass(frozen=True)
class SnapKV(Policy):
    """SnapKV: LLM Knows What You are Looking for Before Generation (Yuhong Li et al., 2024).

    The attention that the last 512 queries of the prompt give each token, averaged over 7
    neighbours; every head keeps the tokens with most of it, as many as its equal part of the pages
    holds. Unlike the paper's, kept tokens are coded in the finest tier instead of staying in 16
    bits, query heads of a group choose together, only queries that have a token behind their
    recent window count for it, and choosing goes on while decoding: scores move half way to what
    recent queries saw, and generated tokens that leave the window must earn their place too.
    """

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = (
        "SnapKV: LLM Knows What You are Looking for Before Generation (Yuhong Li et al., 2024)"
    )
    queries: ClassVar[str] = "last"
    scope: ClassVar[str] = "group"

    pool: int = 7
    """Neighbours over which a prompt's scores are averaged; odd."""

    def observe(self, seen: Seen) -> Tensor:
        score = seen.average()
        return pool_tokens(score, self.pool) if seen.prompt else score

    def steps(self, tokens: Tokens, heads: Heads, memo: dict[Any, Any]) -> Tensor:
        return one_tier(ordered(tokens.score, tokens), heads)
