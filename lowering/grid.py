"""The plain frame: a Hadamard rotation, then the same uniform grid on every coordinate."""

from __future__ import annotations

from functools import lru_cache

import torch

from .codes import Frame
from .hadamard import rotation

#: Step of the uniform mid-rise grid with the least squared error on a unit normal
#: (J. Max, Quantizing for minimum distortion, 1960), by digits of two bits.
STEP = {1: 0.9957, 2: 0.3352, 3: 0.1041, 4: 0.0308}


@lru_cache(maxsize=64)
def grid_frame(heads: int, dim: int, digits: int, device: torch.device) -> Frame:
    """A frame without centre for ``heads`` heads, ``digits`` 2-bit digits a vector.

    Every coordinate gets one digit before any gets a second. Layers may share the tensors.
    """
    into = rotation(dim)
    place = torch.arange(digits) // dim
    dims = torch.arange(digits) % dim
    width = torch.bincount(dims, minlength=dim)
    step = torch.tensor([STEP.get(int(n), 1.0) for n in width], dtype=torch.float64)
    shift = 2 * (width[dims] - 1 - place)
    back = torch.cat([into.T, torch.zeros(1, dim, dtype=into.dtype)])
    grid = torch.stack([step, 4.0**width, torch.ones(dim, dtype=torch.float64)])
    plan = torch.stack([dims, shift]).to(torch.uint8)
    parts = (into.float(), back.float(), grid.float(), plan)
    return Frame(*(x.expand(heads, *x.shape).contiguous().to(device) for x in parts))
