"""The generated kernels on a GPU: against the reference, at size, and inside CUDA graphs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import kernel_cases

from skv_compile.lowering import kernels, ops

CUDA = torch.device("cuda")
BOUND = 2**-10

#: bfloat16 results are rounded to 2 ** -9 of themselves, whatever was computed.
HALF = 2**-8
LARGE = {"dim": 128, "heads": 8, "group": 4, "slots": 8192, "length": 4000}
LARGE = {**LARGE, "dtype": torch.bfloat16}
ROWS = {"heads": 2, "slots": 1024, "length": 600, "batch": 64}
SIZES = {
    "2 bits": {**LARGE, "retention": "none", "bits": 2.2},
    "1 bit": {**LARGE, "retention": "none", "bits": 1.2},
    "4 bits": {**LARGE, "retention": "none", "bits": 4.2},
    "2 bits, padded rows": {**LARGE, "retention": "none", "bits": 2.2, "batch": 3, "mask": "bool"},
    "rdr": {**LARGE, "bits": 1.125, "batch": 2, "mask": "bool"},
    "rdr, 4 queries": {**LARGE, "bits": 1.125, "queries": 4, "mask": "hole"},
    "group 1": {**LARGE, "retention": "none", "bits": 2.2, "group": 1},
    "64 rows": {**LARGE, **ROWS, "bits": 1.125, "mask": "bool"},
    "float16": {**LARGE, "retention": "none", "bits": 2.2, "dtype": torch.float16},
}


@pytest.mark.parametrize("name", kernel_cases.CASES)
def test_kernels_equal_the_reference(name):
    got, want = kernel_cases.attend_both(CUDA, raw=True, **kernel_cases.CASES[name])
    assert kernel_cases.error(got, want) < BOUND


@pytest.mark.parametrize("name", SIZES)
def test_kernels_equal_the_reference_at_size(name):
    got, want = kernel_cases.attend_both(CUDA, raw=True, **SIZES[name])
    assert kernel_cases.error(got, want) < HALF


def test_the_op_takes_the_kernels_and_their_work_is_kept(monkeypatch):
    def no(*args, **kw):
        raise AssertionError("the reference was called")

    state, random = kernel_cases.filled(CUDA, **kernel_cases.TRACKED)
    state.keeper.tick(1)
    monkeypatch.setattr(ops.reference, "attend", no)
    monkeypatch.setattr(kernels, "work_of", no)  # made by tick, not by the op
    q, k, v = random(4, 1), random(2, 1), random(2, 1)
    position = torch.tensor([300], device=CUDA)
    assert torch.isfinite(state.attend(q, k, v, None, position, False, 0.125)).all()


def test_replay_follows_lengths_and_pages():
    """A captured step equals an eager one while tokens arrive, pages move, and a sequence ends."""
    settings = {**kernel_cases.TRACKED, "bits": 1.5, "group": 4}
    state, random = kernel_cases.filled(CUDA, **settings)
    q, k, v = random(8, 1), random(2, 1), random(2, 1)
    position = torch.tensor([300], device=CUDA)
    state.keeper.tick(1)
    state.attend(q, k, v, None, position, False, 0.125)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = state.attend(q, k, v, None, position, False, 0.125)
        state.append(k, v, None, position)
    for n in range(300, 440):
        for tensor in (q, k, v):
            tensor.copy_(random(tensor.shape[1], 1))
        position.fill_(n)
        if n > 300:
            state.keeper.tick(1)
        want = kernels.attend(
            q, k, v, None, position, state.tensors, 0.125, state.layout
        )  # with work of its own
        graph.replay()
        assert kernel_cases.error(out, want) < 1e-6
    state.reset()
    state.keeper.tick(1)
    position.fill_(0)
    graph.replay()
    torch.testing.assert_close(out, v.repeat_interleave(4, 1), rtol=1e-3, atol=1e-3)


def test_poison_in_unused_scratch_reaches_no_result(monkeypatch):
    """Allocations are filled with NaN before the kernels run."""
    real = torch.empty

    def poisoned(*args, **kw):
        x = real(*args, **kw)
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(77)

    for name in ("tiers", "left padding", "frame"):
        with monkeypatch.context() as m:
            m.setattr(kernels.torch, "empty", poisoned)
            got, want = kernel_cases.attend_both(CUDA, raw=True, **kernel_cases.CASES[name])
        assert kernel_cases.error(got, want) < BOUND


def test_the_reference_can_be_asked_for(monkeypatch):
    monkeypatch.setenv(kernels.SWITCH, "reference")
    state, random = kernel_cases.filled(CUDA, **kernel_cases.UNIFORM)
    q = random(4, 1)
    assert "reference" in str(kernels.refusal(state.layout, q, None, 2))
    assert os.environ[kernels.SWITCH] == "reference"
