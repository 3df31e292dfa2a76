"""Whether what a prompt brings is worked on by kernels or by the PyTorch reference."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import triton_found, turned_off


def on_kernels(x: Tensor) -> bool:
    """Whether keys or values like these have kernels: on a GPU of compute capability 8.0 or later,
    unless the environment asks for the reference."""
    return (
        x.is_cuda
        and x.dtype != torch.float64
        and triton_found()
        and not turned_off()
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )
