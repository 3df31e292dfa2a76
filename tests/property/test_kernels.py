"""The generated kernels in Triton's interpreter, their source, and that it compiles for GPUs."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import kernel_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skv_compile.cache import schedule
from skv_compile.codec import tiers
from skv_compile.codec.tiers import choose_layout
from skv_compile.config import Config
from skv_compile.lowering import generate, kernels, reference
from skv_compile.lowering.generate import RAW_SHIFT, Raw, Spec
from skv_compile.lowering.reference import intake
from skv_compile.lowering.work import Work, segments_of, visits_of

pytest.importorskip("triton")
CPU = torch.device("cpu")

# fp16 holds a query's numbers and the softmax's exponents to 2 ** -11; errors of many tokens
# average out, those of one token's exponent do not.
BOUND = 2**-10

LAYOUT = choose_layout(Config(bits=2.2, retention="none"), 64, 900, "float32", True)

#: The cases that the interpreter does soon; the others are slow.
SOON = ("grid", "frame", "4 bits", "tiers, D=128", "5 queries", "nothing coded")

# With a GPU there is no interpreter: tests/gpu/test_kernels_cuda.py runs the same cases there.
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton is not interpreted in this process"
)


@interpreted
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SOON else pytest.mark.slow)
        for name in kernel_cases.CASES
    ],
)
def test_kernels_equal_the_reference(name):
    got, want = kernel_cases.attend_both(CPU, raw=False, **kernel_cases.CASES[name])
    assert kernel_cases.error(got, want) < BOUND


@interpreted
def test_a_sequence_that_begins_anew_sees_nothing_of_the_old_one():
    state, random = kernel_cases.filled(CPU, **kernel_cases.UNIFORM)
    q, k, v = random(4, 1), random(2, 1), random(2, 1)
    begin = torch.tensor([0])
    got = kernels.attend(q, k, v, None, begin, state.tensors, 0.125, state.layout, raw=False)
    torch.testing.assert_close(got, v.repeat_interleave(2, 1), rtol=1e-3, atol=1e-3)


@interpreted
@given(st.data())
@settings(max_examples=20, deadline=None)
def test_append_and_retain_of_one_token_equal_their_references(data):
    from skv_compile.lowering import store

    batch = data.draw(st.integers(1, 3))
    retention = data.draw(st.sampled_from(["none", "rdr"]))
    more = {"retention": retention, "page_tokens": 8, "recent": 12, "sinks": 4}
    state, random = kernel_cases.filled(CPU, batch=batch, length=40, slots=64, dim=16, **more)
    own, other = ([x.clone() for x in state.tensors[:4]] for _ in range(2))
    for n in range(data.draw(st.integers(1, 3))):
        q, k, v, mask, position = kernel_cases.one_token(data, batch, random, n)
        if retention == "rdr":
            reference.retain(q, position, own[2], own[3], state.layout)
            store.retain(q, position, other[2], other[3], state.layout)
        with AsOnADevice():
            reference.append(k, v, mask, position, own[0], own[1], own[3], state.layout)
        store.append(k, v, mask, position, other[0], other[1], other[3], state.layout)
        for a, b in zip(own, other, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


class AsOnADevice:
    """What the reference would raise on the CPU it flags, as on an accelerator."""

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(intake, "_raise_now", lambda *args: None)

    def __exit__(self, *error):
        self.patch.undo()


def spec(bits: float = 2.2, retention: str = "none", dim: int = 128, group: int = 4) -> Spec:
    layout = choose_layout(Config(bits=bits, retention=retention), dim, 9000, "bfloat16", True)
    return Spec(layout.key, group, 1, "bool", 0.0, True)


def test_source_is_the_same_for_the_same_spec_and_differs_for_any_other():
    first = spec()
    changed = {
        "layout": spec(dim=64).layout,
        "group": 2,
        "tokens": 2,
        "mask": "none",
        "mask_min": -1.0,
        "raw": False,
        "least": 16,
        "rows_prepare": 32,
        "chained": True,
    }
    assert set(changed) == {f.name for f in dataclasses.fields(Spec)}
    text = generate.source(first)
    generate.source.cache_clear()
    assert generate.source(first) == text
    for name, value in changed.items():
        assert generate.source(dataclasses.replace(first, **{name: value})) != text, name


def test_caches_of_other_lengths_have_the_same_kernels():
    q, k = torch.zeros(1, 4, 1, 64), torch.zeros(1, 2, 1, 64)
    specs = set()
    for length in (2000, 3000, 40000, 90000):
        layout = choose_layout(Config(bits=2.2), 64, length, "float32", True)
        specs.add(kernels.spec_of(q, k, None, layout.key, False))
    assert len(specs) == 2  # small caches and large ones


@pytest.mark.parametrize("digit", range(8))
def test_unpacked_digits_are_exact(digit):
    """The bit tricks of the assembly, on all words at once."""
    words = torch.arange(-(2**15), 2**15, dtype=torch.int32) & 0xFFFF
    both = words | words.flip(0) << 16
    raw = Raw.of(digit)
    shift = RAW_SHIFT[digit]
    moved = (
        (both.long() & 0xFFFFFFFF) << shift if shift > 0 else (both.long() & 0xFFFFFFFF) >> -shift
    )
    bits = (moved & int(raw.mask, 16) | int(raw.one, 16)) & 0xFFFFFFFF
    low = (bits & 0xFFFF).to(torch.uint16).view(torch.float16).float() - raw.offset
    high = (bits >> 16 & 0xFFFF).to(torch.uint16).view(torch.float16).float() - raw.offset
    assert torch.equal(low, (words >> 2 * digit & 3).float())
    assert torch.equal(high, (words.flip(0) >> 2 * digit & 3).float())
    minus = torch.tensor([int(raw.minus, 16) & 0xFFFF], dtype=torch.int32).to(torch.uint16)
    assert float(minus.view(torch.float16)) == -raw.offset - 1.5


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from skv_compile.lowering import generate
from skv_compile.lowering.generate import Spec

POINTERS = dict(
    q="bf16", k="bf16", v="bf16", mask="u8", position="i64", meta="i64", exact_keys="bf16",
    exact_values="bf16", turn="fp32", key_back="bf16", key_grid="fp32", key_plan="u8",
    queries="fp16", terms="fp32", powers="fp32", flags="i8", exact_part="fp32", exact_stat="fp32",
    pool="u8", pool_words="i16", table="i32", visits="i32", work="i32", part="fp32", stat="fp32",
    pieces="fp32", ready="i32", out="bf16", work_first="i32", value_back="bf16", value_grid="fp32",
    value_plan="u8",
)
module = generate.module(eval(sys.argv[1]))
for name in ("prepare", "pages", "merge"):
    function = getattr(module, name)
    constants = {n: v for n, v in (("H", 8), ("NS", 128)) if n in function.arg_names}
    kinds = {
        n: "constexpr" if n in constants
        else "*" + POINTERS[n] if n in POINTERS
        else "fp32" if n == "scale" else "i32"
        for n in function.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(function.arg_names)
        if n in POINTERS and n != "work_first"
    }
    made = triton.compile(
        ASTSource(function, kinds, constants, aligned),
        target=GPUTarget("cuda", int(sys.argv[2]), 32),
        options={"num_warps": 1 if name == "pages" else 4},
    )
    text = made.asm["ttgir"]
    if name == "pages":
        # Codes reach the tensor cores as they lie in shared memory.
        loop = text[text.rindex("scf.for"):]
        assert "ttg.async_copy_global_to_local" in loop
        assert "local_alloc %acc" not in loop, "decoded values go through shared memory"
        assert "local_alloc %s" not in loop, "decoded keys go through shared memory"
"""


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_kernels_compile_without_a_gpu(capability):
    for one in (spec(), spec(1.125, "rdr")) if capability == 90 else (spec(),):
        one = dataclasses.replace(one, chained=capability == 90)
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-c", COMPILE, repr(one), str(capability)],
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("no kernels", {"layout": dataclasses.replace(LAYOUT, kind="rings")}),
        ("torch.float16", {"q": torch.zeros(1, 4, 1, 64, dtype=torch.float16)}),
        (kernels.LONG, {"q": torch.zeros(1, 4, 17, 64)}),
        (kernels.LONG, {"q": torch.zeros(1, 128, 1, 64), "group": 128}),
        ("every head", {"mask": torch.zeros(1, 4, 1, 9)}),
        ("made for 8", {"heads": 8}),
        (None, {"mask": torch.zeros(1, 1, 1, 9), "heads": 4}),
    ],
)
def test_what_kernels_cannot_do_is_said(what, change, monkeypatch):
    monkeypatch.delenv(kernels.SWITCH, raising=False)
    forward = {"layout": LAYOUT, "q": torch.zeros(1, 4, 1, 64), "mask": None, "group": 2, **change}
    reason = kernels.refusal(**forward)
    assert reason is None if what is None else what in reason
    monkeypatch.setenv(kernels.SWITCH, "reference")
    assert kernels.SWITCH in kernels.refusal(**forward)


# ---------------------------------------------------------------- work


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_segments_cover_every_visit_once_and_cost_alike(data):
    tiers, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    numbers = st.lists(st.integers(0, 60), min_size=tiers * groups, max_size=tiers * groups)
    count = torch.tensor([data.draw(numbers) for _ in range(2)])
    start = (count.flatten().cumsum(0) - count.flatten()).view_as(count)
    weight = torch.tensor([1.0, 2.0, 5.0][:tiers])
    programs = data.draw(st.integers(1, 40))
    segments, first = segments_of(count, start, weight, programs)
    assert segments.shape == (2, programs + tiers * groups, 4)
    for layer in range(2):
        seen = []
        for k in range(tiers * groups):
            own = segments[layer, first[layer, k] : first[layer, k + 1]]
            assert (own[:, 0] * tiers + own[:, 1] == k).all()
            assert (own[:, 3] > 0).all()
            places = [n for _, _, low, n_ in own.tolist() for n in range(low, low + n_)]
            assert places == list(
                range(int(start[layer, k]), int(start[layer, k] + count[layer, k]))
            )
            seen += own.tolist()
        assert not segments[layer, first[layer, -1] :, 3].any()
        total = float((count[layer] * weight.repeat(groups)).sum())
        for _, tier, _, n in seen:
            # Twice a fair share, where a whole part is rounded down, and one visit more.
            assert n * weight[tier] <= 2 * total / programs + weight[tier] + 1e-6


def test_visits_reach_every_token_in_a_column_of_its_own_block():
    state, _ = kernel_cases.filled(CPU, batch=2, group=4, **kernel_cases.TRACKED)
    t, layout = state.tensors, state.layout
    tile = [16] * len(layout.tiers)
    for slots in (1, 2, 8):
        every = [slots] * len(tile)
        visits, count = visits_of(t.table[None], t.pool, t.info, layout, every, tile)
        assert int(count.sum()) == len(visits)
        content = state.keeper.pool.read([0], codes=False)
        want = sorted(
            (int(g), int(i)) for x in content.tokens for g, i in zip(x.group, x.i, strict=True)
        )
        got = []
        bins = torch.arange(count.numel()).repeat_interleave(count.flatten())
        for (page, kind, base, block), place in zip(visits.tolist(), bins.tolist(), strict=True):
            tier = place % len(layout.tiers)
            field = layout.fields[tier]["gap"]
            first, n = kind % 65536, kind // 65536
            i = base
            for gap in t.pool[page, field.slice][first : first + n].tolist():
                i += gap
                if gap != 255 and block <= i // layout.block < block + slots:
                    got.append((place // len(layout.tiers), i))
        assert sorted(got) == want


# ---------------------------------------------------------------- the list of work over time


@pytest.fixture
def _scheduled(monkeypatch):
    """Lists of work on the CPU too, and short strides."""
    monkeypatch.setattr(schedule, "has_kernels", lambda *args: True)
    monkeypatch.setattr(tiers, "STRIDE", 16)


@pytest.mark.usefixtures("_scheduled")
@pytest.mark.parametrize("more", [{}, {"retention": "none"}, {"dim": 128, "bits": 1.0}])
def test_what_a_schedule_costs_is_what_it_takes_and_it_is_enough(more):
    state, _ = kernel_cases.filled(CPU, batch=2, group=4, **{**kernel_cases.TRACKED, **more})
    pool = state.keeper.pool
    fixed, of_page = schedule.Schedule.cost(1, 2, pool.heads, 4, state.layout, CPU)
    assert pool.schedule.bytes == fixed + of_page * pool.pages
    t = state.tensors
    one = (t.table[None], t.pool, t.info, t.meta[None, :, 2], state.layout, 4)
    assert len(kernels.plan_work(*one).visits) <= len(t.visits)


@interpreted
@pytest.mark.usefixtures("_scheduled")
@pytest.mark.slow
@pytest.mark.parametrize("retention", ["rdr", "none", "streaming"])
def test_kept_work_follows_pages_as_they_move(retention):
    settings = {**kernel_cases.TRACKED, "page_tokens": 8, "retention": retention, "bits": 2.5}
    state, random = kernel_cases.filled(CPU, heads=1, length=120, **settings)
    t, layout = state.tensors, state.layout

    def step(n: int, check: bool) -> None:
        state.keeper.tick(1)
        q, k, v = random(2, 1), random(1, 1), random(1, 1)
        position = torch.tensor([n])
        if check:
            work = Work(t.visits, t.segments, t.first)
            got = kernels.attend(q, k, v, None, position, t, 0.125, layout, work=work, raw=False)
            want = reference.attend(q, k, v, None, position, t, False, 0.125, layout)
            assert kernel_cases.error(got, want) < BOUND
        state.retain(q, k, v, None, position, 0.125)
        state.append(k, v, None, position)

    for n in range(120, 160):
        step(n, n % 5 == 0)
    state.crop(30)
    step(130, True)
    step(0, True)  # anew, and nobody says so
    step(1, True)
    state.reset()
    for n in range(40):
        step(n, n in (0, 1, 39))
