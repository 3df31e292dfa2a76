"""From what tokens are worth to their levels, within the pages that are allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CacheStateError
from .allocate import NEVER, levels_at, solve
from .heads import Heads
from .policies.base import Policy
from .tokens import Tokens, pages_for

BIN_SHIFT = 17  # bits of a float32 below those that number a bin of multipliers
BINS = 1 << (31 - BIN_SHIFT)
#: Layers of a prompt may take this many times their part of the budget while the later ones,
#: which may want less, are not known.
SLACK = 3.0


def steps_for(policy: Policy, tokens: Tokens, heads: Heads, memo: dict[Any, Any]) -> Tensor:
    """A policy's steps; none leads above a token's level."""
    steps = policy.steps(tokens, heads, memo)
    number = torch.arange(1, steps.shape[1] + 1, device=steps.device)
    return steps.masked_fill(number > tokens.level[:, None], NEVER)


def decide(
    policy: Policy,
    tokens: Tokens,
    heads: Heads,
    memo: dict[Any, Any],
    allowed: int,
    part: float = 1.0,
) -> Tensor:
    """Levels [J] of tokens that take at most ``allowed`` pages.

    ``part``: of all layers, how many the tokens are of.
    """
    steps = steps_for(policy, tokens, heads, memo)
    layout, groups, tiers = heads.layout, heads.groups, heads.tiers
    capacity = torch.tensor(layout.capacity, device=steps.device)
    share = torch.tensor(policy.shares(heads.layers), device=steps.device, dtype=torch.float64)
    group = torch.arange(groups, device=steps.device)
    if policy.scope == "all":
        scope_of, quota = torch.zeros_like(group), torch.ones(1, dtype=torch.float64)
    elif policy.scope == "layer":
        scope_of, quota = heads.layer(group), share / heads.layers
    else:
        scope_of, quota = group, share[heads.layer(group)] / groups
    scopes = len(quota)
    quota = quota.to(steps.device) / (part if policy.scope != "all" else 1.0)

    def pages(level: Tensor) -> Tensor:
        key = tokens.group * (tiers + 1) + level
        counts = torch.bincount(key, minlength=groups * (tiers + 1)).view(groups, tiers + 1)[:, 1:]
        full = ((counts + capacity - 1) // capacity).sum(1)
        return torch.zeros(scopes, dtype=full.dtype, device=full.device).index_add_(
            0, scope_of, full
        )

    scope = scope_of[tokens.group]
    # Of one layer's tokens only its own scopes' part counts.
    mine = torch.zeros(scopes, dtype=torch.bool, device=steps.device)
    mine[scope] = True
    most = allowed if policy.scope == "all" else int(_whole(quota * allowed)[mine].sum())
    room = float(allowed)
    for _ in range(32):
        limit = _whole(quota * room)
        multiplier = solve(steps, scope, scopes, pages, limit)
        level = levels_at(steps, multiplier[scope])
        # Long gaps between tokens take slots too, which the count above leaves out.
        excess = pages_for(tokens.at(level), layout) - most
        if excess <= 0:
            return level
        part_of = allowed / max(1, most)
        room = max(0.0, min(room, int(pages(level).sum()) * part_of) - excess * part_of)
    raise CacheStateError(f"{len(tokens)} tokens found no place in {allowed} pages.")


def _whole(quota: Tensor) -> Tensor:
    """Whole pages of quotas [scopes], their sum kept: the largest remainders are rounded up."""
    floor = (quota + 1e-6).floor()
    left = int(quota.sum() + 1e-6) - int(floor.sum())
    order = (floor - quota).argsort(stable=True)
    floor[order[: max(0, left)]] += 1
    return floor.long()


class Arriving:
    """One multiplier for the layers of a prompt as they come, before the later ones are known.

    Keeps a histogram of steps by multiplier, weighted with the bytes they add.
    """

    def __init__(self, heads: Heads) -> None:
        self._heads, self._seen = heads, 0
        self._bytes: Tensor | None = None

    @property
    def share(self) -> float:
        """The part of the budget that the layers so far may take."""
        return self._share(self._seen)

    def part(self, layer: int, pages: int) -> int:
        """Pages for the layers before ``layer`` when there is no room for it."""
        return int(pages * self._share(layer))

    def _share(self, layers: int) -> float:
        x = layers / self._heads.layers
        return x * (1 + (SLACK - 1) * (1 - x) ** 2)

    def levels(self, steps: Tensor, layer: Tensor, layers: Sequence[int], allowed: int) -> Tensor:
        """Levels [J] of the tokens of the next ``layers``, whose steps [J, tiers] these are;
        ``layer`` [J]: which one each is of. ``allowed`` pages for all layers.

        Layers that come together are looked at one after another too, so that they are told the
        same as layers that come one by one.
        """
        if len(layers) == 1:
            return self._next(steps, allowed)
        level = torch.zeros_like(layer)
        for number in layers:
            mine = (layer == number).nonzero().squeeze(1)
            level[mine] = self._next(steps[mine], allowed)
        return level

    def _next(self, steps: Tensor, allowed: int) -> Tensor:
        """Levels of the tokens of the next layer."""
        heads = self._heads
        sizes = heads.sizes(steps.device)
        added = sizes.diff().expand_as(steps)
        bins = (steps.clamp(min=0).view(torch.int32) >> BIN_SHIFT).long()
        counted = torch.bincount(
            bins.flatten(), (added * (steps > 0)).flatten().double(), minlength=BINS
        )
        self._bytes = counted if self._bytes is None else self._bytes + counted
        self._seen += 1
        share = self.share
        page = float(sizes[1]) * heads.layout.capacity[0]
        above = self._bytes.flip(0).cumsum(0).flip(0)
        first = int((above > allowed * share * page).sum())  # bins below it are too much
        if first == 0:  # room for all
            return levels_at(steps, steps.new_tensor(NEVER / 2))
        bits = torch.tensor((first << BIN_SHIFT) - 1, dtype=torch.int32)
        return levels_at(steps, bits.view(torch.float32).to(steps.device))
