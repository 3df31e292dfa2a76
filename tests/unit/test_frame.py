"""The fitted frame: its digit plan, its arithmetic, what it gains, and when it is left alone."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from skv_compile.codec.tiers import layouts, shared_layout
from skv_compile.config import HEAD_DIMS, Config
from skv_compile.lowering import codes
from skv_compile.lowering.grid import grid_frame
from skv_compile.lowering.layout import Digits, Layout
from skv_compile.lowering.reference import calibrate
from skv_compile.lowering.reference.calibrate import fit_frames
from skv_compile.lowering.reference.pages import (
    decode_records,
    encode_records,
    page_bytes,
    page_records,
)
from skv_compile.lowering.state import State
from skv_compile.lowering.turn import half_split_plan, turn

CPU = torch.device("cpu")
EMPTY = torch.empty(0)
BF16 = 2.0**-8  # relative rounding of a bfloat16


def rope(dim: int) -> Tensor:
    return half_split_plan(10_000.0 ** -(torch.arange(0, dim, 2) / dim), dim)


def prompt(
    tokens: int = 512, heads: int = 2, dim: int = 64, group: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a layer with rotary keys: a strong mean, a decaying spectrum, peaked attention."""
    g = torch.Generator().manual_seed(seed)

    def cloud(n: int, mean: float) -> Tensor:
        spectrum = 0.9 ** (torch.arange(dim) * 64 / dim)
        basis = torch.linalg.qr(torch.randn(n, dim, dim, generator=g))[0]
        x = torch.randn(1, n, tokens, dim, generator=g) * spectrum * dim**0.5 / 2
        return x @ basis + mean * torch.randn(1, n, 1, dim, generator=g)

    position = torch.arange(tokens)
    k = turn(cloud(heads, 2.0), position, rope(dim))
    q = turn(cloud(heads * group, 0.5), position, rope(dim))
    return q, k, cloud(heads, 0.3)


def layout(dim: int = 64, digits: int | None = None, block: int = 64, page: int = 8) -> Layout:
    tiers = (Digits(digits or dim, digits or dim),)
    return Layout("digits", dim, 4096, page, 4, 32, page, tiers, block=block, calibrate=256)


def fit(data: tuple[Tensor, Tensor, Tensor], form: Layout) -> tuple[codes.Frame, codes.Frame]:
    plan = rope(form.head_dim) if form.block else EMPTY
    bases = fit_frames(*data, None, torch.arange(data[0].shape[2]), plan, form)[:2]
    return tuple(x.frame(0, 0, n) for x, n in zip(bases, form.tiers[0], strict=True))


def state(frames: tuple[codes.Frame, codes.Frame], form: Layout) -> State:
    plan = rope(form.head_dim) if form.block else EMPTY
    keys, values = (codes.Basis.of([frame]) for frame in frames)
    return State(*[EMPTY] * 10, plan, *keys, *values, EMPTY)


def pages_of(k: Tensor, v: Tensor, i: Tensor, frames, form: Layout) -> Tensor:
    """Whole pages [B, H, n, page_bytes] of keys and values of the coded tokens i."""
    records = encode_records(k, v, i[None, None], state(frames, form), form, 0)
    paged = {name: x.unflatten(2, (-1, form.page_tokens)) for name, x in records.items()}
    return page_bytes(paged, form, 0)


def through_pages(data, frames, form: Layout) -> tuple[Tensor, Tensor]:
    """Keys and values after the sinks as their pages give them back."""
    k, v = (x[:, :, form.sinks :] for x in data[1:])
    i = torch.arange(k.shape[2] // form.page_tokens * form.page_tokens)
    pages = pages_of(k[:, :, : len(i)], v[:, :, : len(i)], i, frames, form)
    assert pages.shape[3] == form.page_bytes
    records = {name: x.flatten(2, 3) for name, x in page_records(pages, form, 0).items()}
    return decode_records(records, i[None, None], state(frames, form), form, 0)


# ---------------------------------------------------------------- the plan of the digits


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("rate", [0.5, 1, 2])
def test_digits_of_a_dimension_come_most_significant_first(dim: int, rate: float) -> None:
    count = int(rate * dim)
    q, k, v = prompt(600, dim=dim, group=1)
    frames = fit((q, k, v), layout(dim, count))
    # A second digit gains more than a first where most coordinates are 0 and few are large.
    rare = v * (torch.rand(v.shape) < 0.02) * torch.logspace(1, -1, dim)
    for frame in (*frames, fit((q, k, rare), layout(dim, count))[1]):
        assert frame.plan.shape == (2, 2, count)
        for (dims, shifts), (step, levels, weight) in zip(frame.plan, frame.grid, strict=True):
            for d in range(dim):
                mine = shifts[dims == d].tolist()
                assert mine == [2 * n for n in reversed(range(len(mine)))]
                assert levels[d] == 4 ** len(mine)
            assert torch.stack([step, weight]).min() > 0


def test_dimensions_get_different_widths_where_the_data_is_uneven() -> None:
    frame, _ = fit(prompt(), layout())
    widths = frame.grid[:, 1].log2() / 2
    assert widths.sum(-1).tolist() == [64, 64]
    assert widths.max() >= 3
    assert (widths == 0).any()


# ---------------------------------------------------------------- encode and decode in float64


def encoded(x: Tensor, frame: codes.Frame, unbiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors [n, D] of the one head of a frame in float64: digits, radii, and vectors."""
    into, grid, out = frame.into[0].double(), frame.grid[0].double(), frame.out[0].double()
    z = (x.double() - out[-1]) @ into
    step, levels, weight = grid
    size = (z**2).mean(-1, keepdim=True) ** 0.5
    tried = []
    for gain in codes.GAINS:
        code = torch.floor(z / size / gain / step + levels / 2)
        code = torch.maximum(torch.zeros(()), torch.minimum(code, levels - 1))
        zh = step * (code + 0.5 - levels / 2)
        # What is left of z after the best multiple of zh.
        multiple = (weight * z * zh).sum(-1, keepdim=True) / (weight * zh**2).sum(-1, keepdim=True)
        tried.append((code, zh, (weight * (z - multiple * zh) ** 2).sum(-1), multiple[:, 0]))
    best = torch.stack([error for _, _, error, _ in tried]).argmin(0)
    rows = torch.arange(len(x))
    code, zh, _, radius = (torch.stack(part)[best, rows] for part in zip(*tried, strict=True))
    if unbiased:
        whole = (weight * z**2).sum(-1) / (weight * z * zh).sum(-1)
        radius = torch.minimum(whole, codes.UNBIASED_CAP * radius)
    dims, shifts = frame.plan[0].long()
    digits = code[:, dims].long() // 2**shifts % 4
    vectors = (radius[:, None] * zh) @ torch.linalg.inv(into) + out[-1]
    return digits, radius, vectors


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("unbiased", [True, False])
def test_a_fitted_frame_codes_as_the_float64_formula(dim: int, unbiased: bool) -> None:
    data = prompt(300, heads=1, dim=dim)
    frame, _ = fit(data, layout(dim, block=0))
    digits, radius = codes.encode(data[1], frame, unbiased=unbiased)
    want_digits, want_radius, want = encoded(data[1][0, 0], frame, unbiased)
    same = (digits[0, 0] == want_digits).all(-1)
    assert same.float().mean() > 0.97  # what lies on the edge of two cells may round either way
    error = (radius[0, 0].double() / want_radius - 1).abs()
    assert error[same].max() < 1e-4
    # ``out`` is the inverse of ``into`` up to bfloat16.
    back, rows = codes.decode(digits, radius, frame)[0, 0].double(), frame.out[0].double()
    span = 4 * BF16 * (want - rows[-1]).norm(dim=-1) + BF16 * rows[-1].norm()
    assert ((back - want).norm(dim=-1) < span)[same].all()
    sums = (digits[0, 0].double() - 1.5) @ rows[:-1] * radius[0, 0, :, None].double() + rows[-1]
    assert (back - sums).abs().max() < 1e-5 * sums.abs().max()


# ---------------------------------------------------------------- what it gains


def logit_error(data, form: Layout, frames) -> float:
    """Weighted squared error of late queries' logits, in float64; constant shifts are free."""
    q, k = (x.double() for x in data[:2])
    kh, _ = through_pages(data, frames, form)
    q, old = q[:, :, -64:], slice(form.sinks, k.shape[2] - 96)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    kh = kh.double().repeat_interleave(q.shape[1] // kh.shape[1], 1)
    scale = q.shape[-1] ** -0.5
    a = (q @ k.mT * scale).softmax(-1)[..., old]
    kh = kh[:, :, : a.shape[-1]]
    error = q @ (kh - k[:, :, old]).mT * scale
    return ((a**2 * error**2).sum() / (a**2).sum()).item()


@pytest.mark.parametrize("digits", [64, 128])
def test_the_frame_beats_the_plain_grid_and_the_turn_beats_none(digits: int) -> None:
    data = prompt(1024)
    flat, turned = layout(digits=digits, block=0), layout(digits=digits)
    plain = grid_frame(2, 64, digits, CPU)
    grid = logit_error(data, flat, (plain, plain))
    frame = logit_error(data, turned, fit(data, turned))
    assert frame < 0.4 * grid
    assert frame < 0.7 * logit_error(data, flat, fit(data, flat))


def test_a_head_without_structure_is_no_worse_than_on_the_grid() -> None:
    data = tuple(torch.randn(1, h, 1024, 64) for h in (4, 2, 2))
    form = layout(block=0)
    plain = grid_frame(2, 64, 64, CPU)
    assert logit_error(data, form, fit(data, form)) < 1.1 * logit_error(data, form, (plain, plain))


# ---------------------------------------------------------------- hard keys

HARD = {
    "zero": lambda k: torch.zeros_like(k),
    "huge": lambda k: k * 1e15,
    "tiny": lambda k: k * 1e-15,
    "constant": lambda k: torch.full_like(k, 3.0),
    "same": lambda k: k[:, :, :1].expand_as(k).contiguous(),
    "one_hot": lambda k: torch.eye(k.shape[-1]).repeat(9, 1)[: k.shape[2]].expand_as(k).clone(),
}


@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("name", HARD)
def test_hard_keys_and_values_are_fitted_and_coded(name: str, dim: int) -> None:
    q, k, v = prompt(516, dim=dim)
    k = HARD[name](turn(k, -torch.arange(516), rope(dim)))
    data = (q, k, HARD[name](v))
    form = layout(dim, 2 * dim, block=0)
    frames = fit(data, form)
    assert all(torch.isfinite(x).all() for frame in frames for x in frame)
    for got, x in zip(through_pages(data, frames, form), data[1:], strict=True):
        x = x[:, :, 4:]
        assert torch.isfinite(got).all()
        error = (got - x).double().norm(dim=-1)
        limit = {"constant": BF16, "same": BF16, "zero": 0.0}.get(name, 0.45)
        assert (error <= limit * x.double().norm(dim=-1)).all()


@pytest.mark.parametrize("size", [1e15, 1e-15, 0.0])
def test_keys_unlike_the_prompt_stay_finite(size: float) -> None:
    data, form = prompt(300), layout()
    frames = fit(data, form)
    for back in through_pages((data[0], data[1] * size, data[2] * size), frames, form):
        assert torch.isfinite(back).all()


def test_a_page_of_one_token_and_a_page_of_the_same_token_hold_the_same_codes() -> None:
    data = prompt(300)
    one, many = layout(page=1), layout(page=8)
    frames = fit(data, many)
    k, v = (x[:, :, 7:8] for x in data[1:])
    single = pages_of(k, v, torch.arange(1), frames, one)
    k, v = (x.expand(-1, -1, 8, -1).contiguous() for x in (k, v))
    page = pages_of(k, v, torch.arange(8), frames, many)
    for name, field in many.fields[0].items():
        tokens = page[..., field.slice].unflatten(-1, (8, -1))
        assert torch.equal(tokens, single[..., None, one.fields[0][name].slice].expand_as(tokens))


# ---------------------------------------------------------------- when frames are left alone


def test_only_the_beginning_of_a_long_enough_sound_sequence_changes_frames() -> None:
    q, k, v = prompt(300)
    form = layout()
    plain = codes.stored(codes.Basis.of([grid_frame(2, 64, 64, CPU)]))
    fresh = [*plain, *plain, torch.zeros(2, 4, 1)]

    def changed(q=q, k=k, v=v, start=0, form=form) -> bool:
        frames = [x.clone() for x in fresh]
        position = torch.arange(start, start + k.shape[2])
        calibrate(q, k, v, None, position, rope(64), frames, form)
        assert all(torch.isfinite(x).all() for x in frames)
        return not all(torch.equal(a, b) for a, b in zip(frames, fresh, strict=True))

    assert changed()
    assert changed(*(x[:, :, :256] for x in (q, k, v)))
    assert not changed(*(x[:, :, :255] for x in (q, k, v)))
    assert not changed(start=1)
    assert not changed(form=replace(form, calibrate=0))
    for bad in (torch.nan, torch.inf):
        for name, x in (("k", k), ("v", v)):
            x = x.clone()
            x[0, 1, 200, 3] = bad
            assert not changed(**{name: x})


# ---------------------------------------------------------------- the same on every process


def digest() -> str:
    """All bytes of the frames of a fixed prompt."""
    frames = fit(prompt(300), layout())
    raw = (x.contiguous().view(torch.uint8).numpy().tobytes() for f in frames for x in f)
    return hashlib.sha256(b"".join(raw)).hexdigest()


def test_frames_are_the_same_twice_and_in_another_process() -> None:
    first, here = digest(), Path(__file__)
    torch.manual_seed(1)
    assert digest() == first
    code = (
        f"import sys; sys.path.insert(0, {str(here.parent)!r}); import torch; "
        f"torch.set_num_threads(1); import {here.stem}; print({here.stem}.digest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == first


# ---------------------------------------------------------------- tiers


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("codec", ["grid", "frame", "rings"])
def test_every_tier_stores_what_its_rate_says(codec: str, dim: int) -> None:
    settings = Config(codec=codec, retention="none"), dim, 4096, "float32"
    found = layouts(*settings, turned=True)
    for form in found:
        (digits,) = form.tiers
        assert form.rate(0) == digits.key / dim + digits.value / dim + 8 / dim
        assert digits.key % 8 == digits.value % 8 == 0
    rates = [form.rate(0) for form in found]
    assert rates == sorted(set(rates))


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("codec", ["grid", "frame", "rings"])
def test_tiers_that_share_pages_store_whole_words_and_differ(codec: str, dim: int) -> None:
    form = shared_layout(Config(codec=codec), dim, 4096, "float32", turned=True)
    for digits, record in zip(form.tiers, form.record_bytes, strict=True):
        assert digits.key % 8 == digits.value % 8 == 0
        assert record == (digits.key + digits.value) / 4 + 4
    rates = [form.rate(tier) for tier in range(len(form.tiers))]
    assert rates == sorted(set(rates))
