"""Heads that look far back keep everything, the others nothing but sinks and recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..heads import Heads
from ..table import Table, check_shape
from ..tokens import Tokens
from .base import Policy, one_tier

OCTAVES = 60.0  # over which the steps are spread, so that float32 tells all of them apart


@dataclass(frozen=True)
class Retrieval(Policy):
    """DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads
    (Guangxuan Xiao et al., 2024), and RazorAttention: Efficient KV Cache Compression Through
    Retrieval Heads (Hanlin Tang et al., 2024).

    A table has a score for every kv head of the model. The heads with the highest scores keep
    every token, in the finest tier, as far as the pages go; the head that fits in part keeps its
    most recent tokens, and all others only sinks and the recent window. DuoAttention learns its
    scores as gates on synthetic passkeys; ``skv calibrate --retrieval-heads`` measures them as
    RazorAttention does, from repeated random tokens. Unlike both, the number of retrieval heads
    follows from the budget, and what they keep is coded; RazorAttention also leaves a compensation
    token for what it drops, and there is none here.
    """

    name: ClassVar[str] = "retrieval"
    paper: ClassVar[str] = (
        "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads "
        "(Guangxuan Xiao et al., 2024)"
    )
    scope: ClassVar[str] = "all"

    table: Table = ()
    """Scores of the kv heads of every layer."""

    def steps(self, tokens: Tokens, heads: Heads, memo: dict[Any, Any]) -> Tensor:
        check_shape(self.table, heads.layers, heads.heads)
        score = torch.tensor(self.table, dtype=torch.float64, device=tokens.i.device).flatten()
        rank = torch.empty_like(score)
        order = score.argsort(stable=True)
        rank[order] = torch.arange(len(order), dtype=rank.dtype, device=rank.device)
        longest = max(1, heads.layout.max_tokens)
        place = rank[heads.head(tokens.group)] * longest + tokens.i + 1
        return one_tier(torch.exp2(OCTAVES * (place / (len(order) * longest) - 1)), heads)
