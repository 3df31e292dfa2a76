"""Windows of consecutive tokens, the same ones in all heads of several layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import ConfigError
from ..heads import Heads
from ..tokens import Tokens
from .base import Policy, one_tier

WINDOW = 8  # tokens; strides are whole windows


@dataclass(frozen=True)
class WindowKV(Policy):
    """WindowKV: Task-Adaptive Group-Wise KV Cache Window Selection for Efficient LLM Inference
    (Youhui Zuo et al., 2025).

    Tokens are kept in windows of 8, scored by the attention of the last 512 queries, the mean over
    heads. All heads of a layer keep the same windows, and so do the layers of a group, whose first
    layer chooses; the budget of a group falls linearly with its depth. The paper has a classifier
    of tasks choose between the two ways to score a window; here ``scoring`` is set by hand. Its
    last 16 or 32 queries are 64 here, and its choice, made once at the end of the prompt, is made
    again at every refresh, for what is still there. Kept tokens are coded in the finest tier
    instead of 16 bits.
    """

    name: ClassVar[str] = "window"
    paper: ClassVar[str] = (
        "WindowKV: Task-Adaptive Group-Wise KV Cache Window Selection for Efficient LLM Inference "
        "(Youhui Zuo et al., 2025)"
    )
    queries: ClassVar[str] = "last"
    scope: ClassVar[str] = "layer"

    scoring: str = "mean"
    """Of a window: ``"mean"`` of its tokens, or of the ``"top"`` half of them."""
    layers_together: int = 4
    """Layers that share the choice of the first of them."""
    slope: float = 0.5
    """The first group of layers gets 1 + slope of the mean budget, the last 1 - slope."""

    def __post_init__(self) -> None:
        if self.scoring not in ("mean", "top"):
            raise ConfigError(f"scoring={self.scoring!r}: expected 'mean' or 'top'.")
        if self.layers_together < 1:
            raise ConfigError(f"layers_together={self.layers_together}: expected at least 1.")
        if not 0 <= self.slope <= 1:
            raise ConfigError(f"slope={self.slope}: expected a number from 0 to 1.")

    def steps(self, tokens: Tokens, heads: Heads, memo: dict[Any, Any]) -> Tensor:
        order = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.i.device)
        layer = heads.layer(tokens.group)
        row = tokens.group // heads.heads % heads.batch
        window = tokens.i // WINDOW
        alive = tokens.level > 0
        for number in (layer[alive] // self.layers_together).unique().tolist():
            mine = alive & (layer // self.layers_together == number)
            first = number * self.layers_together
            # At a refresh all layers are here; in a prompt they come one by one.
            key = (self.name, number)
            chooses = mine & (layer == first)
            if key not in memo or bool(chooses.any()):
                if not bool(chooses.any()):
                    chooses = mine & (layer == layer[mine].min())
                memo[key] = self._ranks(tokens[chooses], heads)
            rank = memo[key]
            known = mine & (window < rank.shape[1])
            order[known] = rank[row[known], window[known]]
        return one_tier(order, heads)

    def _ranks(self, tokens: Tokens, heads: Heads) -> Tensor:
        """[B, windows] ranks, from 1 for the worst, of the windows of one layer."""
        count = int(tokens.i.max()) // WINDOW + 1
        shape = (heads.batch, heads.heads, count * WINDOW)
        place = tokens.group % (heads.batch * heads.heads) * shape[-1] + tokens.i
        score = tokens.score.new_zeros(heads.batch * heads.heads * shape[-1])
        there = score.clone()
        score[place], there[place] = tokens.score, 1.0
        score = score.view(shape).unflatten(2, (count, WINDOW))
        there = there.view(shape).unflatten(2, (count, WINDOW)).sum(-1)
        if self.scoring == "top":
            score = score.topk(WINDOW // 2, -1).values
        mean = score.sum(-1) / there.clamp(1, score.shape[-1])
        mean = mean.mean(1).masked_fill((there == 0).all(1), -1.0)
        # Of equals, the later window is more.
        order = mean.T.flatten().argsort(stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(1, len(order) + 1, device=order.device)
        return rank.view(count, heads.batch).T

    def shares(self, layers: int) -> list[float]:
        groups = -(-layers // self.layers_together)
        step = 2 * self.slope / max(1, groups - 1)
        raw = [1 + self.slope - step * (n // self.layers_together) for n in range(layers)]
        mean = sum(raw) / max(1, layers)
        return [x / mean for x in raw]
