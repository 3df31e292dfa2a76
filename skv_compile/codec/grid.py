"""The ``grid`` codec: a Hadamard rotation, then the same uniform grid on every coordinate."""

from __future__ import annotations

from functools import cache

import torch

from ..lowering.codes import Frame
from .hadamard import rotation

#: Step of the uniform mid-rise grid with the least squared error on a unit normal
#: (J. Max, Quantizing for minimum distortion, 1960), by digits of two bits.
STEP = {1: 0.9957, 2: 0.3352}


@cache
def grid_frame(heads: int, dim: int, digits_per_dim: int, device: torch.device) -> Frame:
    """The frame of ``heads`` heads with ``digits_per_dim`` 2-bit digits on every coordinate.

    All layers of a cache share one.
    """
    turn = rotation(dim)
    levels = 4**digits_per_dim
    step = STEP[digits_per_dim]
    # Digits by significance, so that the first ``dim`` digits alone are the coarser code.
    places = torch.arange(digits_per_dim).repeat_interleave(dim)
    dims = torch.arange(dim).repeat(digits_per_dim)
    weights = step * 4.0 ** (digits_per_dim - 1 - places).double()
    out = turn.T[dims] * weights[:, None]
    grid = torch.tensor([step, levels, 1.0])[:, None].expand(3, dim)
    plan = torch.stack([dims, 2 * (digits_per_dim - 1 - places)]).int()
    parts = (turn.float(), grid, plan, out.float())
    return Frame(*(x.expand(heads, *x.shape).contiguous().to(device) for x in parts))
