"""What a retention policy is: how attention becomes a score, and scores become steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..allocate import ALWAYS, NEVER
from ..tokens import Tokens

if TYPE_CHECKING:
    from ..heads import Heads


ARRIVING = "arriving"  # in the memo: a long forward is passing


@dataclass
class Seen:
    """What sampled queries of one layer see of some of its tokens.

    ``weights`` [B, H, G, S, n]: attention weights, 0 where a query does not count for a token.
    ``counted`` [B, S, n] bool: pairs where the query reads, or would read, the token's code:
    the token is outside the query's recent window. ``prompt``: the first tokens of a sequence.
    """

    weights: Tensor
    counted: Tensor
    prompt: bool

    @property
    def counts(self) -> Tensor:
        """[B, n] queries that count for every token."""
        return self.counted.sum(1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Query heads of a kv head, queries, tokens."""
        group, queries, n = self.weights.shape[2:]
        return group, queries, n

    def total(self, power: int = 1) -> Tensor:
        """Sum of a power of the weights over the group and the queries that count: [B, H, n].

        Of a prompt on a GPU only sums and the largest weight are at hand; a policy that asks for
        ``weights`` has them made, some heads at once.
        """
        weights = self.weights if power == 1 else self.weights**power
        return (weights.sum(2) * self.counted[:, None]).sum(2)

    def average(self, power: int = 1) -> Tensor:
        """:meth:`total` over the number of weights that count: [B, H, n]."""
        return self.total(power) / (self.counts.clamp(min=1)[:, None] * self.shape[0])

    def most(self) -> Tensor:
        """The largest weight of the group and the queries that count: [B, H, n]."""
        return self.largest(self.weights)

    def mean(self, x: Tensor) -> Tensor:
        """Mean of x [B, H, G, S, n] over the group and the queries that count: [B, H, n]."""
        queries = self.counts.clamp(min=1)[:, None]
        return (x.sum(2) * self.counted[:, None]).sum(2) / (queries * x.shape[2])

    def largest(self, x: Tensor) -> Tensor:
        """Largest x [B, H, G, S, n] >= 0 over the group and the queries that count: [B, H, n]."""
        if 0 in x.shape[2:4]:
            return x.new_zeros(*x.shape[:2], x.shape[4])
        return (x.amax(2) * self.counted[:, None]).amax(2)


@dataclass(frozen=True)
class Policy:
    """Which tokens are kept, and how well. Subclasses are frozen, with every number a field.

    ``name``: in ``Config(retention=...)``. ``paper``: where it comes from. ``queries``: which of
    a forward's queries are looked at: the ``"last"`` 512, 256 ``"spread"`` over it, or ``""``:
    none.
    ``scope``: the tokens that share one budget: ``"all"``, or those of one ``"layer"`` or
    ``"group"`` (layer, row and head), of which each has its share.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    queries: ClassVar[str] = ""
    scope: ClassVar[str] = "all"
    tracked: ClassVar[bool] = True

    decay: float = 0.5
    """Of the score at every refresh: new = decay * old + (1 - decay) * observed."""

    def observe(self, seen: Seen) -> Tensor:
        """Scores [B, H, n] >= 0 of tokens from what queries saw of them."""
        return seen.average()

    def update(self, old: Tensor, observed: Tensor) -> Tensor:
        """The score after a refresh."""
        return self.decay * old + (1 - self.decay) * observed

    def steps(self, tokens: Tokens, heads: Heads, memo: dict[Any, Any]) -> Tensor:
        """Steps [J, tiers] of tokens (``allocate``): not growing with the tier.

        ``memo`` lives as long as a forward; layers of a prompt come one after another, and
        ``memo[ARRIVING]`` is true then.
        """
        raise NotImplementedError  # "none" is not tracked and is never asked

    def shares(self, layers: int) -> list[float]:
        """The share of every layer in the budget, where layers have one each; the mean is 1."""
        return [1.0] * layers


def one_tier(order: Tensor, heads: Heads) -> Tensor:
    """Steps of a policy that keeps a token in the tier ``heads.tier`` or not at all.

    ``order`` [J] >= 0: what has more stays longer.
    """
    steps = torch.full((len(order), heads.tiers), NEVER, device=order.device)
    steps[:, : heads.tier + 1] = order.float().clamp(max=ALWAYS)[:, None]
    return steps


def ordered(score: Tensor, tokens: Tokens) -> Tensor:
    """[J] distinct numbers in the order of the scores; of equals the later token is more."""
    order = tokens.group.argsort(stable=True)
    order = order[tokens.i[order].argsort(stable=True)]
    order = order[score[order].argsort(stable=True)]
    rank = torch.empty(len(order), device=score.device)
    rank[order] = torch.arange(len(order), device=score.device, dtype=rank.dtype)
    return rank


def pool_tokens(score: Tensor, width: int) -> Tensor:
    """Average of scores [..., n] over ``width`` neighbours."""
    if width <= 1 or score.shape[-1] == 0:
        return score
    flat = score.reshape(1, -1, score.shape[-1])
    return torch.nn.functional.avg_pool1d(flat, width, 1, width // 2, count_include_pad=False).view(
        score.shape
    )
