"""The native CPU kernels against the reference: every variant that this CPU can run."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import kernel_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skv_compile.errors import CacheStateError, SkvError
from skv_compile.lowering import codes, kernels, ops, reference
from skv_compile.lowering.cpu import kernels as cpu
from skv_compile.lowering.cpu import library
from skv_compile.lowering.grid import grid_frame
from skv_compile.lowering.layout import GAP_FILLER, Layout
from skv_compile.lowering.state import CODED, KIND, PER_TIER

CPU = torch.device("cpu")
HERE = Path(__file__).resolve().parents[1]
FINE = 32767  # steps of a query's largest number, and of a batch's largest weight

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="there is no C++ compiler")


@pytest.fixture(params=library.possible())
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each in turn is what the ops use."""
    monkeypatch.setenv(library.SWITCH, request.param)
    return str(request.param)


def native(one: kernel_cases.Forward) -> Tensor:
    """What the library makes of a forward that it must not refuse."""
    assert cpu.refusal(one.layout, one.q, one.mask, one.k.shape[1]) is None
    return cpu.attend(*one)


def bound(one: kernel_cases.Forward) -> float:
    """How far an output may be from the reference's, from the rounding of queries and weights.

    A query's number for each digit is off by half of a step, and a digit less 1.5 is at most 1.5:
    that moves a logit by d, and attention to values of length m by 2 m tanh(d / 2). Weights times
    radii are off by half a step of the largest among ``BATCH`` tokens.
    """
    state, layout = one.state, one.layout
    if not bool((state.meta[:, CODED] > 0).any()):
        return 1e-5
    length = one.q.float().norm(dim=-1).amax() * one.scale
    largest, moved, rounded = float(one.v.norm(dim=-1).max()), 0.0, 0.0
    used = state.info[state.table[state.table >= 0].long()]
    for tier in {int(kind) // PER_TIER for kind in used[:, KIND]}:
        key, value = state.frames(layout, tier)
        pages = state.pool[state.table[state.table >= 0].long()]
        pages = pages[used[:, KIND] // PER_TIER == tier]
        fields = layout.fields[tier]
        radius = {
            side: float(codes.decode_radius(pages[:, fields[f"{side}_radius"].slice]).max())
            for side in ("key", "value")
        }
        spread = float(key.out[:, :-1].norm(dim=-1).max() * length)
        moved = max(moved, radius["key"] * 0.75 * key.out[0, :-1].shape[0] * spread / FINE)
        reach = value.out[:, :-1].norm(dim=-1).sum(-1).max() * 1.5 * radius["value"]
        largest = max(largest, float(reach + value.out[:, -1].norm(dim=-1).max()))
        rounded = max(rounded, float(reach) * 128 * 0.5 / FINE)
    return 2 * largest * math.tanh(moved / 2) + rounded + 1e-5 * largest


@pytest.mark.parametrize("name", kernel_cases.CASES)
def test_attention_equals_the_reference(variant: str, name: str) -> None:
    one = kernel_cases.forward(CPU, **kernel_cases.CASES[name])
    got, want = native(one), one.reference()
    assert float((got - want).norm(dim=-1).max()) <= bound(one)
    assert kernel_cases.error(got, want) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", [None, "float"])
def test_attention_of_16_bits_equals_the_reference(
    variant: str, dtype: torch.dtype, mask: str | None
) -> None:
    one = kernel_cases.forward(CPU, dtype=dtype, mask=mask, **kernel_cases.TRACKED)
    got, want = native(one), one.reference()
    assert got.dtype == dtype
    assert kernel_cases.error(got, want) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dim", [16, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 5, 8])
def test_every_head_dim_and_group(variant: str, dim: int, group: int) -> None:
    case = dict(kernel_cases.TRACKED, dim=dim, group=group, heads=1, bits=1.6)
    one = kernel_cases.forward(CPU, **case)
    got, want = native(one), one.reference()
    assert float((got - want).norm(dim=-1).max()) <= bound(one)
    assert kernel_cases.error(got, want) < 1e-3


@pytest.mark.parametrize("bits", [0.7, 1.2, 2.2, 3.2, 4.2])
@pytest.mark.parametrize("codec", ["grid", "frame"])
@pytest.mark.parametrize("retention", ["none", "rdr"])
def test_every_tier(variant: str, bits: float, codec: str, retention: str) -> None:
    if retention == "none" and bits < (2.2 if codec == "grid" else 1.2):
        return  # there is no tier that small
    case = {"bits": bits, "codec": codec, "retention": retention, "page_tokens": 16}
    one = kernel_cases.forward(CPU, turned=codec == "frame", **case)
    got, want = native(one), one.reference()
    assert float((got - want).norm(dim=-1).max()) <= bound(one)
    assert kernel_cases.error(got, want) < 1e-3


@given(
    length=st.integers(1, 300),
    tracked=st.booleans(),
    queries=st.integers(1, 4),
    mask=st.sampled_from([None, "bool", "hole", "float"]),
    page=st.sampled_from([8, 16, 24, 40]),
)
@settings(max_examples=40, deadline=None)
def test_any_length(length: int, tracked: bool, queries: int, mask: str | None, page: int) -> None:
    case = kernel_cases.TRACKED if tracked else kernel_cases.UNIFORM
    kw = {**case, "page_tokens": page, "length": length, "queries": queries, "mask": mask}
    one = kernel_cases.forward(CPU, dim=32, batch=2, coded=False, **kw)
    assert kernel_cases.error(native(one), one.reference()) < 1e-3


def test_slots_without_a_token_are_passed_over_at_equal_results(variant: str) -> None:
    one = kernel_cases.forward(CPU, slots=4096, length=3000, **kernel_cases.TRACKED)
    state, fillers = one.state, 0
    for page in state.table[state.table >= 0].tolist():
        base, kind = state.info[page].tolist()
        if base < 1000 and kind % PER_TIER > 5:
            first = one.layout.fields[kind // PER_TIER]["gap"].offset
            state.pool[page, first + 3] = GAP_FILLER
            fillers += 1
    assert fillers > 10
    assert kernel_cases.error(native(one), one.reference()) < 1e-3


def test_results_do_not_depend_on_the_number_of_threads(variant: str) -> None:
    one = kernel_cases.forward(CPU, slots=8192, length=4000, group=3, **kernel_cases.TRACKED)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 50):  # more than there are pages' tasks
            torch.set_num_threads(threads)
            found.append(native(one))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, found[0]) for x in found)


def test_tensors_need_not_be_contiguous_or_aligned(variant: str) -> None:
    one = kernel_cases.forward(CPU, queries=3, **kernel_cases.UNIFORM)
    want = native(one)

    def strided(x: Tensor) -> Tensor:
        wide = torch.full((x.shape[0], x.shape[2], x.shape[1], x.shape[3] + 3), torch.nan)
        wide[..., 1:-2] = x.transpose(1, 2)
        return wide[..., 1:-2].transpose(1, 2)

    q, k, v = (strided(x) for x in one[:3])
    assert torch.equal(native(one._replace(q=q, k=k, v=v)), want)
    back = (x.flip(-1).contiguous().flip(-1) for x in one[:3])
    assert torch.equal(native(one._replace(**dict(zip("qkv", back, strict=True)))), want)


def test_what_is_not_finite_stays_so(variant: str) -> None:
    one = kernel_cases.forward(CPU, **kernel_cases.TRACKED)
    payload = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32).item()
    for bad in (math.nan, math.inf, payload):
        q = one.q.clone()
        q[0, 1, 0, 5] = bad
        got = native(one._replace(q=q))
        assert bool(got[0, 1].isnan().all())
        assert bool(got[0, [0, 2, 3]].isfinite().all())
    k = one.k.clone()
    k[0, 1, 0, 3] = math.nan
    got = native(one._replace(k=k))
    assert bool(got[0, 2:].isnan().all())
    assert bool(got[0, :2].isfinite().all())


def test_a_query_that_sees_nothing_gets_zeros(variant: str) -> None:
    one = kernel_cases.forward(CPU, mask="bool", batch=2, **kernel_cases.TRACKED)
    assert one.mask is not None
    mask = one.mask.clone()
    mask[1] = False
    got = native(one._replace(mask=mask))
    assert bool((got[1] == 0).all())
    assert torch.equal(got[0], native(one)[0])


def test_a_sequence_that_begins_anew_sees_nothing_of_the_old_one(variant: str) -> None:
    one = kernel_cases.forward(CPU, **kernel_cases.UNIFORM)
    got = native(one._replace(position=torch.tensor([0])))
    torch.testing.assert_close(got, one.v.repeat_interleave(2, 1))


# ------------------------------------------------------------ coding


@pytest.mark.parametrize(("dim", "digits"), [(16, 8), (64, 32), (64, 64), (80, 120), (256, 1024)])
@pytest.mark.parametrize("unbiased", [True, False])
def test_codes_are_those_of_the_reference(
    variant: str, dim: int, digits: int, unbiased: bool
) -> None:
    frame = grid_frame(3, dim, digits, CPU)
    x = torch.randn(2, 3, 200, dim) * torch.rand(2, 3, 200, 1) * 9
    x[0, 0, 3] = 0
    x[0, 0, 4] = math.nan
    found, radius = codes.encode(x, frame, unbiased=unbiased)
    packed, code = cpu.encode_side(x, frame, unbiased)
    want = codes.pack_digits(found)
    # Sums in another order: now and then a number falls on the other side of an edge, or another
    # of two gains that fit alike is taken.
    differ = packed != want
    differ[0, 0, 4] = False  # what is not finite has no code, but a radius of nothing
    assert float(differ.float().mean()) < 0.002
    steps = code[..., 0].int() - codes.encode_radius(radius).int()
    assert float((steps.abs() > 1).float().mean()) < 0.01
    assert int(code[0, 0, 3]) == int(code[0, 0, 4]) == 0


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_append_and_retain_of_one_token_equal_their_references(data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 3))
    retention = data.draw(st.sampled_from(["none", "rdr"]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    more = {"retention": retention, "page_tokens": 8, "recent": 12, "sinks": 4, "dtype": dtype}
    state, random = kernel_cases.filled(CPU, batch=batch, length=40, slots=64, dim=16, **more)
    own, other = ([x.clone() for x in state.tensors[:4]] for _ in range(2))
    for n in range(data.draw(st.integers(1, 3))):
        q, k, v, mask, position = kernel_cases.one_token(data, batch, random, n)
        if state.layout.observed:
            assert cpu.retain(q, position, own[2], own[3], state.layout)
            reference.retain(q, position, other[2], other[3], state.layout)
        done = cpu.append(k, v, mask, position, *own[:2], own[3], state.layout)
        try:
            reference.append(k, v, mask, position, *other[:2], other[3], state.layout)
        except SkvError:
            assert not done
        else:
            assert done
        for mine, theirs in zip(own, other, strict=True):
            assert torch.equal(mine.nan_to_num(7.0), theirs.nan_to_num(7.0))


def test_another_number_of_query_heads_is_refused() -> None:
    state, random = kernel_cases.filled(CPU, **kernel_cases.TRACKED)
    tensors = state.tensors
    with pytest.raises(CacheStateError, match="6 query heads"):
        cpu.retain(random(6, 1), torch.tensor([300]), tensors.queries, tensors.meta, state.layout)


# ------------------------------------------------------------ which one runs


def test_the_op_runs_natively_and_says_when_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = kernel_cases.forward(CPU, **kernel_cases.TRACKED)
    calls = []
    real = cpu.attend
    monkeypatch.setattr(cpu, "attend", lambda *a: calls.append(1) or real(*a))

    def run(one: kernel_cases.Forward) -> Tensor:
        q, k, v, mask, position, state, scale, layout = one
        return ops.attend(q, k, v, mask, position, *state, False, scale, layout.key)

    run(one)
    assert calls == [1]
    kernels.say.cache_clear()
    mask = torch.ones(1, 4, 1, 512, dtype=torch.bool)
    with caplog.at_level(logging.WARNING):
        run(one._replace(mask=mask))
        run(one._replace(mask=mask))
    assert calls == [1]
    assert caplog.text.count("a mask of its own for every head") == 1
    monkeypatch.setenv(library.SWITCH, "reference")
    assert torch.equal(run(one), one.reference())
    assert calls == [1]


def test_a_variant_that_is_not_there_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.SWITCH, "sse9")
    with pytest.raises(SkvError, match=r"SKV_CPU='sse9': expected one of vnni, .*, reference"):
        library.load()
    monkeypatch.setattr(library, "cpu_features", lambda: frozenset({"avx2"}))
    assert library.possible() == ["portable"]
    monkeypatch.setenv(library.SWITCH, "avx2")
    library._chosen.cache_clear()
    try:
        with pytest.raises(SkvError, match="this CPU cannot run it"):
            library.load()
    finally:
        library._chosen.cache_clear()


@pytest.mark.parametrize(("cxx", "why"), [("/nowhere/g++", "no C"), ("false", "false failed")])
def test_without_a_compiler_the_reference_runs_and_says_so_once(
    cxx: str,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    one = kernel_cases.forward(CPU, **kernel_cases.TRACKED)
    q, k, v, mask, position, state, scale, layout = one
    monkeypatch.setenv("CXX", cxx)
    monkeypatch.setenv("SKV_CACHE_DIR", str(tmp_path))
    library._loaded.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                got = ops.attend(q, k, v, mask, position, *state, False, scale, layout.key)
        assert torch.equal(got, one.reference())
        lines = [r.getMessage() for r in caplog.records if "native CPU kernels" in r.getMessage()]
        assert len(lines) == 1
        assert why in lines[0]
        assert not list(tmp_path.rglob("*.so"))
    finally:
        library._loaded.cache_clear()


def test_every_variant_compiles() -> None:
    for name in library.VARIANTS:
        assert library.build(name).exists()


@pytest.mark.slow
def test_sanitizers_find_nothing() -> None:
    """In a process of its own, which the address sanitizer must be loaded into first."""
    words = library.compiler()
    assert words is not None
    found = subprocess.run([*words, "-print-file-name=libasan.so"], capture_output=True, text=True)
    asan = found.stdout.strip()
    if not os.path.isabs(asan):
        pytest.skip("this compiler has no address sanitizer")
    environment = os.environ | {
        "LD_PRELOAD": asan,
        # Without the second, frames are made that AVX-512 finds misaligned (GCC bug 110027).
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "sanitized.py")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == str(len(kernel_cases.CASES))


def test_kernels_and_library_agree_on_which_forwards_are_long() -> None:
    layout = Layout("digits", 64, 512, 16, 4, 12, 64)
    q = torch.zeros(1, 4, kernels.MOST_TOKENS + 1, 64)
    assert cpu.refusal(layout, q, None, 2) is kernels.LONG
