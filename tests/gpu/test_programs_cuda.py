"""Programs of the generator on a CUDA device, through Inductor."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "property"))
from programs import Program, is_possible
from programs_run import check, run

PROGRAMS = (
    Program(kv_heads=2, group=2, steps=2),
    Program(kv_heads=2, group=3, attention="matmul", dtype="bfloat16", mask="additive"),
    Program(
        batch=2, kv_heads=2, attention="einsum_bthd", softmax="fp32", mask="padded", fill="min"
    ),
    Program(group=2, attention="mT", write="assign_slice", read="sliced", chunks=(5, 3)),
    Program(kv_heads=2, attention="method", write="copy_slice", mask="bias", dtype="float16"),
    Program(kv_heads=2, gqa="expand_reshape", mask="flag", rope=True, norm="rms", layers=2),
    Program(layers=2, kv_heads=2, attention="matmul", distractor="weights_returned"),
    Program(layers=2, kv_heads=2, distractor="read_elsewhere"),
)


@pytest.fixture(autouse=True)
def _everything_on_the_gpu() -> Iterator[None]:
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_program_means_the_same(program: Program, inner: str) -> None:
    assert is_possible(program)
    check(run(program, inner=inner))
