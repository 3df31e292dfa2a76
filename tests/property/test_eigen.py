"""The Jacobi kernel in Triton's interpreter, and that it compiles for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

# With a GPU there is no interpreter: tests/gpu runs the same there.
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton is not interpreted in this process"
)

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from skv_compile.lowering import eigen

kinds = dict(matrix="*fp32", values="*fp32", vectors="*fp32", D="i32", rounds="i32", N="constexpr")
triton.compile(
    ASTSource(eigen._jacobi, kinds, {"N": 128}),
    target=GPUTarget("cuda", int(sys.argv[1]), 32),
    options={"num_warps": 16},
)
"""


@interpreted
@pytest.mark.parametrize("dim", [16, *(pytest.param(n, marks=pytest.mark.slow) for n in (40, 64))])
def test_vectors_diagonalise_the_matrix(dim):
    """From eigenvalues over six decades, two of them equal, and a diagonal matrix."""
    from skv_compile.lowering import eigen

    generator = torch.Generator().manual_seed(dim)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
    wanted = 10 ** (-6 * torch.linspace(0, 1, dim, dtype=torch.float64))
    wanted[1] = wanted[0]
    x = torch.stack([(basis * wanted) @ basis.T, torch.diag(wanted)]).float()
    values, vectors = eigen.eigh(x)
    vectors = vectors.double()
    eye = torch.eye(dim, dtype=torch.float64)
    assert (vectors.mT @ vectors - eye).abs().max() < 1e-4
    rest = vectors.mT @ x.double() @ vectors - torch.diag_embed(values.double())
    assert rest.norm() < 1e-2 * x.norm()
    for own in values.double():
        torch.testing.assert_close(own.sort(descending=True)[0], wanted, rtol=0, atol=1e-2)


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_it_compiles_without_a_gpu(capability):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(capability)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
