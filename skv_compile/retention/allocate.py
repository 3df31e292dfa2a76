"""The rate-distortion allocator: which level every token gets under one budget of pages.

A policy says for each token and tier the multiplier below which it wants at least that tier
(``steps``). For a multiplier lambda the level of a token is the number of its steps above it,
so one number settles all tokens at once, and the pages they take fall as it rises. The search
goes over the bits of a float32: 31 exact halvings, no tolerance.

Steps come from costs by Lagrangian duality (H. Everett, Generalized Lagrange multiplier method,
1963): minimising cost + lambda * bytes for each token alone minimises the total cost among all
assignments of at most as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ALWAYS = torch.finfo(torch.float32).max
NEVER = -1.0  # multipliers are not negative
CHUNK = 1 << 20  # tokens whose slopes are held at once


def steps_of(cost: Tensor, size: Tensor) -> Tensor:
    """Costs [..., L + 1] of levels 0..L with sizes [L + 1] or [..., L + 1] -> steps [..., L].

    Step n is the multiplier below which some level >= n beats every level < n:
    max over hi >= n of min over lo < n of (cost[lo] - cost[hi]) / (size[hi] - size[lo]).
    A level that is no larger than a lower one is preferred to it; one that costs infinitely much
    is never taken.
    """
    size = size.expand_as(cost)
    if cost.dim() == 2 and len(cost) > CHUNK:
        pairs = zip(cost.split(CHUNK), size.split(CHUNK), strict=True)
        return torch.cat([steps_of(*pair) for pair in pairs])
    # Slopes [..., hi - 1, lo]; those with hi <= lo are not read.
    more = size[..., 1:, None] - size[..., None, :-1]
    slope = (cost[..., None, :-1] - cost[..., 1:, None]) / more
    slope = torch.where(slope < 0, NEVER, slope)
    slope = torch.where(more > 0, slope, ALWAYS)
    slope = torch.where(torch.isfinite(cost[..., 1:, None]), slope, NEVER)
    levels = range(1, cost.shape[-1])
    steps = torch.stack([slope[..., n - 1 :, :n].amin(-1).amax(-1) for n in levels], -1)
    return torch.nan_to_num(steps.clamp(min=NEVER, max=ALWAYS), nan=NEVER)


def levels_at(steps: Tensor, multiplier: Tensor) -> Tensor:
    """Levels [J] of steps [J, L] at multipliers [] or [J]."""
    return (steps > multiplier.reshape(-1, 1)).sum(-1)


def solve(
    steps: Tensor,
    scope: Tensor,
    scopes: int,
    pages: Callable[[Tensor], Tensor],
    allowed: Tensor,
) -> Tensor:
    """The least multiplier of every scope whose tokens fit.

    Args:
        steps: [J, L] float32, not growing along L.
        scope: [J] int64, the scope of each token.
        pages: levels [J] -> pages [scopes] that they take. It must not grow when levels fall.
        allowed: [scopes] pages.

    Returns:
        [scopes] float32; infinite where nothing fits.
    """
    low = torch.full((scopes,), -1, dtype=torch.int64, device=steps.device)  # below every step
    high = torch.full_like(low, 0x7F800000)  # the bits of infinity
    fits_low = pages(levels_at(steps, torch.full_like(steps[:, 0], NEVER / 2))) <= allowed
    for _ in range(32):
        middle = (low + high) // 2
        value = _from_bits(middle)
        fits = pages(levels_at(steps, value[scope])) <= allowed
        high = torch.where(fits, middle, high)
        low = torch.where(fits, low, middle)
    return torch.where(fits_low, NEVER / 2, _from_bits(high))


def _from_bits(bits: Tensor) -> Tensor:
    """Non-negative float32 by its bits; -1 is a number below 0."""
    value = bits.clamp(min=0).to(torch.int32).view(torch.float32)
    return torch.where(bits < 0, NEVER / 2, value)
