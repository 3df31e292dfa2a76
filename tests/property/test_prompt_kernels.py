"""Kernels of a prompt in Triton's interpreter against their references, and that they compile."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from skv_compile.lowering.layout import Digits, Layout
from skv_compile.lowering.reference import statistics as reference
from skv_compile.lowering.reference.calibrate import fit_frames
from skv_compile.lowering.reference.intake import Sources, intake
from skv_compile.lowering.reference.pages import decode_records, encode_records, turn_keys
from skv_compile.lowering.state import State
from skv_compile.lowering.turn import half_split_plan, interleaved_plan
from skv_compile.retention.evidence import Exact, Whole, forward_queries
from skv_compile.retention.observe import look, look_at_prompt
from skv_compile.retention.policies.base import Policy
from skv_compile.retention.policies.h2o import H2O
from skv_compile.retention.policies.rdr import RDR
from skv_compile.retention.tokens import Content

pytest.importorskip("triton")
EMPTY = torch.empty(0)

# With a GPU there is no interpreter: tests/gpu/test_frame_cuda.py holds what these kernels make of
# a prompt against the CPU there.
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton is not interpreted in this process"
)


class Largest(Policy):
    """A policy that asks for the weights themselves."""

    queries = "last"

    def observe(self, seen):
        return seen.largest(seen.weights.sqrt())


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


class Raw(NamedTuple):
    """A prompt with all of its queries [B, Hq, T, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    lead: Tensor
    plan: Tensor
    layout: Layout

    @property
    def prompt(self) -> reference.Prompt:
        q = reference.sample_queries(self.q, self.lead, self.k.shape[1])
        return reference.Prompt(q, *self[1:5], False, self.layout)


def prompt(
    batch: int = 1,
    dim: int = 64,
    tokens: int = 200,
    block: int = 64,
    dtype: torch.dtype = torch.float32,
    lead: tuple[int, ...] = (),
    plan=half_split_plan,
) -> Raw:
    """A random prompt of two kv heads with a mean; padding and one hidden token hold rubbish."""
    g = torch.Generator().manual_seed(batch + dim)
    q = torch.randn(batch, 4, tokens, dim, generator=g)
    k, v = (
        torch.randn(batch, 2, tokens, dim, generator=g) + torch.randn(1, 2, 1, dim, generator=g)
        for _ in range(2)
    )
    padding = torch.tensor(lead or (0,) * batch)
    dead = (torch.arange(tokens) < padding[:, None])[:, None, :, None]
    q, k, v = (x.masked_fill(dead, torch.nan).to(dtype) for x in (q, k, v))
    k[:, :, 150, 3] = torch.inf
    layout = Layout(
        "digits", dim, 1024, 8, 4, 32, 8, (Digits(dim, dim),), block=block, calibrate=256
    )
    speeds = 10_000.0 ** -(torch.arange(0, dim, 2) / dim)
    return Raw(q, k, v, padding, plan(speeds, dim), layout)


CASES = {
    "plain": {},
    "no turn": {"block": 0},
    "padding": {"batch": 2, "lead": (0, 37)},
    "a row of padding alone": {"batch": 2, "lead": (0, 200)},
    "blocks of 24": {"block": 24, "dim": 16},
    "blocks of 200": {"block": 200, "dim": 80, "plan": interleaved_plan},
    "fp16, D=128": {"dim": 128, "dtype": torch.float16, "block": 128},
    "D=256": {"dim": 256, "tokens": 160},
}


def names(*some: str) -> list[Any]:
    """Cases, those that take the interpreter longest marked slow."""
    slow = (
        "D=256",
        "blocks of 24",
        "a row of padding alone",
        "blocks of 200",
        "fp16, D=128",
        "padding",
        "no turn",
    )
    return [pytest.param(n, marks=pytest.mark.slow if n in slow else ()) for n in some]


@interpreted
@pytest.mark.parametrize("name", names(*CASES))
def test_statistics_equal_their_reference(name: str) -> None:
    from skv_compile.lowering import statistics

    data = prompt(**CASES[name])
    bound = 1e-2 if data.q.dtype == torch.float16 else 1e-4
    begin = data.prompt
    for got, want in zip(statistics.attention(begin), reference.attention(begin), strict=True):
        assert distance(got, want) < bound
    for got, want in zip(statistics.sides(begin), reference.sides(begin), strict=True):
        for a, b in zip(got, want, strict=True):
            assert a is b or distance(a, b) < bound


@interpreted
@pytest.mark.parametrize("name", names("plain", "blocks of 200", "fp16, D=128", "D=256", "no turn"))
@pytest.mark.parametrize("tier", [0, 1])
def test_codes_equal_their_reference(name: str, tier: int) -> None:
    from skv_compile.lowering import decode, encode

    data = prompt(**{**CASES[name], "tokens": 280})
    dim = data.k.shape[3]
    form = replace(data.layout, tiers=(Digits(dim // 2, dim // 2), Digits(2 * dim, dim)))
    data = data._replace(layout=form)
    q, k, v = (torch.nan_to_num(x, posinf=0.0) for x in (data.q, data.k, data.v))
    *bases, _ = fit_frames(q, k, v, None, torch.arange(280), data.plan, form)
    state = State(*[EMPTY] * 10, data.plan, *bases[0], *bases[1], EMPTY)
    k, v = k[:, :, 4:130] * torch.logspace(-2, 2, 126)[:, None], v[:, :, 4:130]
    k[:, :, 5] = bases[0].back[:, -1]  # nothing but the centre
    i = torch.arange(7, 133)[None, None]
    want = encode_records(k, v, i, state, form, tier)
    frames, decoded = state.frames(form, tier), {}
    for side, x, at, frame in zip(("key", "value"), (k, v), (i, None), frames, strict=True):
        found = encode.encode_side(x, at, frame, data.plan, form, side == "key")
        for field, got in zip(("digits", "radius"), found, strict=True):
            assert got.shape == want[f"{side}_{field}"].shape
            different = (got != want[f"{side}_{field}"]).float().mean()
            assert different < 2e-3, (side, field)
            decoded[f"{side}_{field}"] = got
        length = encode.lengths(x, at, frame, data.plan, form)
        moved = turn_keys(x, i, state, form, -1) if side == "key" else x
        want_length = ((moved.float() - frame.centre) @ frame.into.float()).square().mean(-1).sqrt()
        torch.testing.assert_close(length, want_length, rtol=1e-4, atol=1e-6)
    pairs = zip(
        (k, v),
        decode_records(decoded, i, state, form, tier),
        decode_records(want, i, state, form, tier),
        strict=True,
    )
    for x, got, other in pairs:
        error = (other - x).norm()
        assert abs(float((got - x).norm() / error) - 1) < 1e-3
    sides = zip(("key", "value"), (i, None), frames, strict=True)
    others = decode_records(want, i, state, form, tier)
    for (side, at, frame), other in zip(sides, others, strict=True):
        fields = (want[f"{side}_digits"], want[f"{side}_radius"])
        got = decode.decode_side(*fields, at, frame, data.plan, form)
        torch.testing.assert_close(got, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@interpreted
@pytest.mark.parametrize("name", ["plain", "padding", "fp16, D=128"])
@pytest.mark.parametrize("policy", [RDR(), H2O(), Largest()])
def test_what_kernels_see_of_a_prompt_is_what_the_reference_sees(name: str, policy) -> None:
    data = prompt(**{**CASES[name], "tokens": 200})
    q, k, v = (torch.nan_to_num(x, posinf=0.0) for x in (data.q, data.k, data.v))
    layout = data.layout
    meta = torch.zeros(len(k), 4, dtype=torch.int64)
    exact = (torch.zeros(len(k), 2, layout.exact_slots, k.shape[3], dtype=k.dtype),) * 2
    state = State(*exact, *[EMPTY] * 18)
    seen = torch.arange(200) >= data.lead[:, None]
    found = intake(k, v, seen[:, None, None], torch.arange(200), meta, layout)
    queries = forward_queries(q, found, layout, policy.queries)
    whole = Exact.of_forward(Sources(k, v, *exact, found, layout), found, state, layout)
    content = Content([], [])
    want = look(queries, whole, content, 0, state, layout, 0.125, True, policy.observe)
    layout = replace(layout, tiers=())
    prompt_kernels = Whole(k, v, data.lead, int(data.lead.min()))
    got = look_at_prompt(queries, prompt_kernels, state, layout, 0.125, policy.observe)
    bound = 1e-2 if q.dtype == torch.float16 else 1e-4
    for part in ("exact", "query_energy", "norm", "spread"):
        assert distance(getattr(got, part), getattr(want, part)) < bound, part


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from skv_compile.lowering import decode, encode, sampled, statistics
from skv_compile.lowering.codes import GAINS

POINTERS = {
    **dict.fromkeys(("q", "k", "v", "out", "x", "into", "centre"), "*bf16"),
    **dict.fromkeys(("lead", "numbers", "i"), "*i64"),
    **dict.fromkeys(("number", "partner"), "*i32"),
    **dict.fromkeys(("plan", "digits", "radius"), "*u8"),
    **dict.fromkeys(("top", "weight", "square", "mass", "total", "most"), "*fp32"),
    **dict.fromkeys(("table", "largest", "sums", "size", "grid", "z", "vectors"), "*fp32"),
}
CONSTANTS = dict(
    D=128, DP=128, ROWS=64, KEYS=64, SINKS=4, RECENT=64, BLOCK=128, CELL=128, PRECISE="tf32",
    RUN=1024, COLUMNS=64, TURN=True, WEIGHED=True, QUERIES=False, SPLIT=True, PART=64, BYTES=64,
    BP=64, CAP=1.3, GAINS=GAINS, STEPS=16, ONE=128, DIGITS=132,
)
for module, name, more in (
    (sampled, "_outputs", {}),
    (sampled, "_weights", {}),
    (sampled, "_scores", {}),
    (statistics, "_extent", {"ROWS": 32}),
    (statistics, "_moment", {"ROWS": 32}),
    (statistics, "_moment", {"ROWS": 32, "QUERIES": True}),
    (encode, "_in_frame", {}),
    (encode, "_quantise", {"ROWS": 16}),
    (decode, "_decode", {"PART": 32}),
):
    function = getattr(module, name)
    constants = {n: x for n, x in {**CONSTANTS, **more}.items() if n in function.arg_names}
    kinds = {
        n: "constexpr" if n in constants else "fp32" if n == "scale" else POINTERS.get(n, "i32")
        for n in function.arg_names
    }
    if module is not sampled:
        kinds.update({n: "*fp32" for n in ("out",) if n in kinds})
    if name == "_moment":
        kinds["centre"] = "*fp32"
    stages = 1 if name in ("_moment", "_in_frame", "_decode") else 3
    made = triton.compile(
        ASTSource(function, kinds, constants),
        target=GPUTarget("cuda", int(sys.argv[1]), 32),
        options={"num_warps": 8, "num_stages": stages},
    )
    assert made.metadata.shared <= 160 * 1024, name
"""


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_prompt_kernels_compile_without_a_gpu(capability: int) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
