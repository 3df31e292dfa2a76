"""A fixed orthogonal rotation that spreads a vector's energy over all coordinates."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_SEED = 0x5EED


@cache
def rotation(dim: int) -> Tensor:
    """[dim, dim] float64 orthogonal matrix, the same on every process and device.

    A Hadamard matrix (Sylvester) with random signs on the input. Where ``dim`` is
    ``2**a * m`` with odd ``m > 1``, the Kronecker product with the m-point DCT-II.
    """
    odd = dim
    while odd % 2 == 0:
        odd //= 2
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range((dim // odd).bit_length() - 1):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    h = h / h.shape[0] ** 0.5
    if odd > 1:
        n = torch.arange(odd, dtype=torch.float64)
        dct = torch.cos(torch.pi / odd * (n[None] + 0.5) * n[:, None]) * (2 / odd) ** 0.5
        dct[0] /= 2**0.5
        h = torch.kron(h, dct)
    generator = torch.Generator().manual_seed(_SEED + dim)
    signs = torch.randint(0, 2, (dim,), generator=generator).double() * 2 - 1
    return signs[:, None] * h.T
