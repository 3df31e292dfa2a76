"""The same part of every layer's attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..heads import Heads
from ..tokens import Tokens, runs
from .base import Policy, one_tier


@dataclass(frozen=True)
class PrefixKV(Policy):
    """PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for
    Efficient Generation (Ao Wang et al., 2024).

    The tokens of a layer are ranked by the attention they get, and each layer keeps the shortest
    prefix of its ranking that holds a part p of all its attention; one p serves all layers, the
    largest that fits the pages. So a layer that looks at few tokens keeps few. The paper averages
    over heads, so that they keep the same positions, and finds the sizes offline from a few
    samples; here the tokens of all heads of a layer are in one ranking and p is searched anew at
    every refresh, among what is still there. The mean attention of 256 queries spread over the
    prompt, later of recent ones, stands for the sum over all; kept tokens are coded in the finest
    tier instead of 16 bits. Rows of a batch have a ranking each.
    """

    name: ClassVar[str] = "prefix"
    paper: ClassVar[str] = (
        "PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for "
        "Efficient Generation (Ao Wang et al., 2024)"
    )
    queries: ClassVar[str] = "spread"
    scope: ClassVar[str] = "all"

    floor: float = 1e-4
    """Of the mean score of a layer's tokens, added to each: those that nobody looked at must have
    an order too."""

    def steps(self, tokens: Tokens, heads: Heads, memo: dict[Any, Any]) -> Tensor:
        part = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.score.device)
        order = (tokens.level > 0).nonzero().squeeze(1)
        layer = tokens.group // heads.heads  # of one row
        # Least attention first, of equals the oldest token: what comes after ranks before it.
        for key in (tokens.group, tokens.i, tokens.score, layer):
            order = order[key[order].argsort(stable=True)]
        if len(order):
            layer = layer[order]
            place, _, start, counts = runs(layer)
            found = layer[start]
            mass = tokens.score[order].double().cumsum(0)
            last = mass[counts.cumsum(0) - 1]
            before = torch.cat([last.new_zeros(1), last[:-1]])
            total = last - before
            # What a layer of a prompt has lost while it waited for the others ranks last.
            largest = memo.setdefault(self.name, part.new_zeros(heads.layers * heads.batch))
            largest[found] = torch.maximum(largest[found], total)
            extra = self.floor * torch.where(total > 0, total / counts, 1.0)
            whole = largest[found] + extra * counts
            after = largest[found] - last  # with ``mass``, its own mass and all that ranks later
            each = torch.stack([after, extra, whole]).repeat_interleave(counts, 1)
            # 1 - the mass of those that rank before it.
            part[order] = (each[0] + mass + each[1] * (place + 1)) / each[2]
        return one_tier(part, heads)
