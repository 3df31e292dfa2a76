"""Eigenvalues of small symmetric matrices by a Triton kernel: cyclic Jacobi rotations.

PyTorch sends a batch of matrices of this size to a solver one after another. Here each has a
program of its own, and its rotations run side by side. Import only where Triton is installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .generate import power_of_two

#: Rounds of all pairs; less than 1e-2 of a matrix is then left beside its diagonal. At head dim 64
#: frames were no worse than those of exact vectors after 4.
SWEEPS = 5
LARGEST = 128  # rows; a matrix and its vectors lie in registers


@triton.jit
def _jacobi(matrix, values, vectors, D, rounds, N: tl.constexpr):
    matrix += tl.program_id(0) * D * D
    i = tl.arange(0, N)
    row, col = i[:, None], i[None, :]
    real = (row < D) & (col < D)
    a = tl.load(matrix + row * D + col, mask=real, other=0.0)
    v = tl.where(row == col, 1.0, 0.0)
    for n in range(rounds):
        # Round robin (the last number stays, the others go round): N / 2 pairs that share nothing.
        turn = n % (N - 1)
        partner = (2 * turn - i + N - 1) % (N - 1)
        partner = tl.where(partner == i, N - 1, partner)
        partner = tl.where(i == N - 1, turn, partner)
        own = tl.sum(tl.where(row == col, a, 0.0), 1)
        off = tl.sum(tl.where(col == partner[:, None], a, 0.0), 1)
        off = (off + tl.gather(off, partner, 0)) * 0.5
        # tan of the angle that brings ``off`` to 0, the smaller of two (G. H. Golub and C. F. Van
        # Loan, Matrix Computations, section 8.5); of partners one is the other's negative.
        ratio = (tl.gather(own, partner, 0) - own) / tl.where(off == 0.0, 1.0, 2.0 * off)
        sign = tl.where((ratio > 0) | ((ratio == 0) & (i < partner)), 1.0, -1.0)
        tan = sign / (tl.abs(ratio) + tl.sqrt(1.0 + ratio * ratio))
        tan = tl.where(off == 0.0, 0.0, tan)
        cos = 1.0 / tl.sqrt(1.0 + tan * tan)
        down = tl.broadcast_to(partner[:, None], [N, N])
        along = tl.broadcast_to(partner[None, :], [N, N])
        a = cos[:, None] * (a - tan[:, None] * tl.gather(a, down, 0))
        a = cos[None, :] * (a - tan[None, :] * tl.gather(a, along, 1))
        v = cos[None, :] * (v - tan[None, :] * tl.gather(v, along, 1))
    tl.store(values + tl.program_id(0) * D + i, tl.sum(tl.where(row == col, a, 0.0), 1), mask=i < D)
    tl.store(vectors + tl.program_id(0) * D * D + row * D + col, v, mask=real)


def eigh(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [n, D], in no order, and vectors [n, D, D] (columns) of symmetric x [n, D, D].

    Approximate, in float32: what is small beside a matrix's largest number is not resolved.
    """
    count, dim, _ = x.shape
    if dim > LARGEST:
        raise ValueError(f"matrices of {dim} rows; at most {LARGEST}")
    x = x.contiguous()
    values = x.new_empty(count, dim)
    vectors = torch.empty_like(x)
    size = power_of_two(dim, 16)
    rounds = SWEEPS * (size - 1)
    _jacobi[(count,)](
        x, values, vectors, dim, rounds, N=size, num_warps=max(1, size * size // 1024)
    )
    return values, vectors
