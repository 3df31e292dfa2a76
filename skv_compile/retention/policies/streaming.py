"""The most recent tokens, beside the sinks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..heads import Heads
from ..tokens import Tokens
from .base import Policy, one_tier


@dataclass(frozen=True)
class Streaming(Policy):
    """Efficient Streaming Language Models with Attention Sinks (Guangxuan Xiao et al., 2023).

    Sinks and the exact recent window stay, and before the window as many of the next most recent
    tokens as a head's equal part of the pages holds. Those are coded in the finest tier, where the
    paper keeps one window in 16 bits. Positions stay what they were; the paper counts them inside
    the cache. No attention is looked at.
    """

    name: ClassVar[str] = "streaming"
    paper: ClassVar[str] = (
        "Efficient Streaming Language Models with Attention Sinks (Guangxuan Xiao et al., 2023)"
    )
    scope: ClassVar[str] = "group"

    def steps(self, tokens: Tokens, heads: Heads, memo: dict[Any, Any]) -> Tensor:
        return one_tier(tokens.i + 1, heads)
