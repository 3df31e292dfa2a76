"""What commutes with calibrating and encoding, logits from codes, and rotary turns."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from skv_compile.config import HEAD_DIMS
from skv_compile.lowering import codes
from skv_compile.lowering.layout import Digits, Layout
from skv_compile.lowering.reference import append, attend
from skv_compile.lowering.reference.attend import code_logits
from skv_compile.lowering.reference.calibrate import fit_frames
from skv_compile.lowering.reference.pages import decode_records, encode_records, page_bytes
from skv_compile.lowering.reference.statistics import block_mass, query_moment
from skv_compile.lowering.rings import ring_frame
from skv_compile.lowering.state import State
from skv_compile.lowering.turn import block_start, half_split_plan, interleaved_plan, turn

EMPTY = torch.empty(0)
EPS = torch.finfo(torch.float32).eps
TOKENS = 300
seeds = st.integers(0, 2**31)


def speeds(dim: int) -> Tensor:
    return 10_000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def draw(seed: int, tokens: int = TOKENS, heads: int = 2, dim: int = 64) -> tuple[Tensor, ...]:
    """q, k, v: uneven directions, a mean, rotary keys and queries, two query heads a kv head."""
    g = torch.Generator().manual_seed(seed)
    plan, scale = half_split_plan(speeds(dim), dim), torch.logspace(0.7, -0.7, dim)
    q, k, v = (
        torch.randn(1, n, tokens, dim, generator=g) * scale + torch.randn(1, n, 1, dim, generator=g)
        for n in (2 * heads, heads, heads)
    )
    position = torch.arange(tokens)
    return turn(q, position, plan) / 4, turn(k, position, plan), v


def form(block: int = 64, dim: int = 64, **kw) -> Layout:
    sizes = {"tiers": (Digits(dim, dim),), "block": block, "calibrate": 256, **kw}
    return Layout("digits", dim, 1024, 8, 4, 32, 8, **sizes)


def plan_of(layout: Layout) -> Tensor:
    return half_split_plan(speeds(layout.head_dim), layout.head_dim) if layout.block else EMPTY


def fit_bases(data, layout: Layout, mask: Tensor | None = None) -> tuple[codes.Basis, codes.Basis]:
    return fit_frames(*data, mask, torch.arange(data[0].shape[2]), plan_of(layout), layout)[:2]


def fit(data, layout: Layout, mask: Tensor | None = None) -> tuple[codes.Frame, codes.Frame]:
    """The frames of the one tier of a layout."""
    bases = fit_bases(data, layout, mask)
    return tuple(x.frame(0, 0, n) for x, n in zip(bases, layout.tiers[0], strict=True))


def state(bases, layout: Layout, length: int = 0) -> State:
    """A state of one row and two heads, whose pages hold consecutive tokens."""
    pages = 2 * layout.max_pages
    pool = torch.full((pages, layout.page_bytes), 0xFF, dtype=torch.uint8)
    number = torch.arange(pages, dtype=torch.int32)
    info = torch.stack([number % layout.max_pages * 8, torch.full_like(number, 8)], 1)
    exact = torch.full((2, 1, 2, layout.exact_slots, layout.head_dim), torch.nan)
    meta = torch.tensor([[0, length, 0, 0]])
    table = number.view(1, 2, -1)
    return State(
        *exact,
        EMPTY,
        meta,
        pool,
        info,
        table,
        *[EMPTY] * 3,
        plan_of(layout),
        *bases[0],
        *bases[1],
        EMPTY,
    )


def same(one, other) -> bool:
    return all(
        torch.equal(a, b)
        for f, g in zip(one, other, strict=True)
        for a, b in zip(f, g, strict=True)
    )


# ---------------------------------------------------------------- logits from codes


@pytest.mark.parametrize("kind", ["digits", "rings"])
@pytest.mark.parametrize("block", [0, 16, 64])
@given(
    seed=seeds,
    first=st.integers(0, 50),
    pages=st.integers(1, 9),
    dim=st.sampled_from(HEAD_DIMS),
    tier=st.integers(0, 1),
)
def test_logits_from_codes_are_products_with_the_decoded_keys(
    kind, block, seed, first, pages, dim, tier
):
    if kind == "digits":
        layout = form(block, dim, tiers=(Digits(dim // 16 * 8, 8), Digits(dim, dim)), unit=1)
    else:
        tiers = (Digits(dim, dim), Digits(2 * dim, 2 * dim))
        layout = Layout("rings", dim, 1024, 8, 4, 32, 8, tiers, block=block)
    q, k, v = draw(seed, 8 * pages, dim=dim)
    fitting = draw(seed + 1, 256, dim=dim)
    if kind == "digits":
        bases = fit_bases(fitting, layout)
    else:
        bases = (codes.Basis.of([ring_frame(2, dim, k.device)] * 2),) * 2
    tensors = state(bases, layout)
    i = (8 * first + torch.arange(8 * pages)).expand(1, 2, -1)
    coded = encode_records(k, v, i, tensors, layout, tier)
    keys = decode_records(coded, i, tensors, layout, tier)[0]
    rows = q[:, :, :3].reshape(1, 2, 6, dim)
    got = code_logits(rows, coded, i, tensors, layout, tier)
    want = rows.double() @ keys.double().mT
    # A sum of digits * dim products each way, and angles of up to ``first`` pages.
    room = 64 * EPS * (rows.norm(dim=-1)[..., None] * (keys.norm(dim=-1) + 30)[:, :, None, :])
    room = room * (1 + 8 * (first + pages) * bool(block) / 64)
    assert ((got - want).abs() < room).all()


@pytest.mark.parametrize("block", [0, 64])
@given(seed=seeds)
def test_attention_over_pages_is_attention_over_the_decoded_tokens(block: int, seed: int) -> None:
    layout = form(block)
    q, k, v = draw(seed)
    tensors = state(fit_bases((q, k, v), layout), layout)
    whole = (TOKENS - layout.sinks - layout.recent) // 8
    i = torch.arange(8 * whole)[None, None]
    coded = encode_records(
        k[:, :, 4 : 4 + 8 * whole], v[:, :, 4 : 4 + 8 * whole], i, tensors, layout, 0
    )
    paged = {name: x.unflatten(2, (-1, 8)) for name, x in coded.items()}
    tensors.pool[tensors.table[:, :, :whole].long()] = page_bytes(paged, layout, 0)
    append(k, v, None, torch.arange(TOKENS), *tensors[:2], tensors.meta, layout)
    assert tensors.meta[0].tolist() == [0, TOKENS, 8 * whole, 0]
    for x, back in zip((k, v), decode_records(coded, i, tensors, layout, 0), strict=True):
        x[:, :, 4 : 4 + 8 * whole] = back
    q1, k1, v1 = (x[:, :, :1] for x in draw(seed + 1))
    got = attend(q1, k1, v1, None, torch.tensor([TOKENS]), tensors, False, 0.125, layout)
    keys, values = (torch.cat(x, 2).double().repeat_interleave(2, 1) for x in ((k, k1), (v, v1)))
    want = (q1.double() @ keys.mT * 0.125).softmax(-1) @ values
    assert (got - want).abs().max() < 1e-4 * values.abs().max()


# ---------------------------------------------------------------- what commutes


@given(seed=seeds)
def test_permuting_tokens_permutes_codes(seed: int) -> None:
    data = draw(seed)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(seed))
    for x, frame, unbiased in zip(data[1:], fit(data, form()), (True, False), strict=True):
        digits, radius = codes.encode(x, frame, unbiased=unbiased)
        moved, size = codes.encode(x[:, :, order], frame, unbiased=unbiased)
        equal = (moved == digits[:, :, order]).all(-1)
        assert equal.float().mean() > 0.99  # sums may round differently at another row
        torch.testing.assert_close(size[equal], radius[:, :, order][equal], rtol=1e-4, atol=0)


@given(seed=seeds, power=st.integers(-20, 20), block=st.sampled_from([0, 64]))
def test_powers_of_two_scale_what_is_decoded_and_no_digit(seed: int, power: int, block) -> None:
    """Queries shrink as keys grow, so that attention stays: the frame carries the scale."""
    factor, layout = 2.0**power, form(block)
    q, k, v = draw(seed)
    data, scaled = (q, k, v), (q / factor, k * factor, v * factor)
    frames, others = fit(data, layout), fit(scaled, layout)
    for x, y, one, two in zip(data[1:], scaled[1:], frames, others, strict=True):
        digits, radius = codes.encode(x, one, unbiased=True)
        same_digits, same_radius = codes.encode(y, two, unbiased=True)
        assert torch.equal(digits, same_digits)
        assert torch.equal(radius, same_radius)
        assert torch.equal(one.plan, two.plan)
        want = codes.decode(digits, radius, one) * factor
        assert torch.equal(codes.decode(same_digits, same_radius, two), want)


@given(seed=seeds, power=st.integers(-20, 20))
def test_powers_of_two_about_the_centre_scale_radii_only(seed: int, power: int) -> None:
    data = draw(seed)
    for x, frame in zip(data[1:], fit(data, form()), strict=True):
        frame = frame._replace(back=torch.cat([frame.back[:, :-1], 0 * frame.back[:, -1:]], 1))
        digits, radius = codes.encode(x, frame, unbiased=True)
        scaled, size = codes.encode(x * 2.0**power, frame, unbiased=True)
        assert torch.equal(scaled, digits)
        assert torch.equal(size, radius * 2.0**power)


@given(seed=seeds, block=st.sampled_from([0, 64]), head=st.integers(0, 2))
def test_a_head_alone_gets_the_frame_it_has_among_others(seed: int, block: int, head: int) -> None:
    q, k, v = draw(seed, heads=3)
    layout = form(block)
    alone = fit((q[:, 2 * head : 2 * head + 2], k[:, head, None], v[:, head, None]), layout)
    for one, all_heads, x in zip(alone, fit((q, k, v), layout), (k, v), strict=True):
        mine = codes.Frame(*(part[head, None] for part in all_heads))
        assert close_frames(one, mine, x[:, head, None])


def close_frames(one: codes.Frame, other: codes.Frame, x: Tensor) -> bool:
    """Frames that code vectors alike: the same bytes, or what another order of sums rounds to."""
    if same((one,), (other,)):
        return True
    a, b = (codes.decode(*codes.encode(x, f, unbiased=False), f) for f in (one, other))
    error = (a - x).norm()
    return bool((a - b).norm() < 0.25 * error) and bool(abs((b - x).norm() / error - 1) < 0.01)


@pytest.mark.parametrize("block", [0, 16])
@given(seed=seeds)
def test_the_query_moment_sees_queries_as_the_blocks_of_their_tokens_do(block: int, seed) -> None:
    layout = form(block, 16)
    g = torch.Generator().manual_seed(seed)
    q, w = torch.randn(1, 2, 5, 16, generator=g), torch.rand(1, 2, 5, 90, generator=g)
    w[..., : layout.sinks] = 0
    mass = block_mass(w[:, None], layout)
    got = query_moment(q[:, None], mass, plan_of(layout), layout)[0] / w.sum()
    starts = (torch.arange(90) - 4).clamp(min=0) // 16 * 16 + 4 if block else torch.zeros(90)
    pairs = [(i, i + 8) for i in range(8)]
    seen = rotated(q.unsqueeze(3).expand(-1, -1, -1, 90, -1), -starts, pairs, speeds(16))
    want = torch.einsum("bgnt,bgnti,bgntj->ij", w.double(), seen, seen) / w.double().sum()
    assert (got - want).abs().max() < 1e-4


# ---------------------------------------------------------------- padding


@given(seed=seeds, pad=st.integers(1, 60), block=st.sampled_from([0, 64]))
def test_left_padding_leaves_no_trace_in_the_frames(seed: int, pad: int, block: int) -> None:
    data, layout = draw(seed), form(block)
    see = torch.ones(TOKENS + pad, TOKENS + pad, dtype=torch.bool).tril()
    see[:, :pad] = False
    found = []
    for rubbish in (0.0, 1000.0):
        padded = [torch.nn.functional.pad(x, (0, 0, pad, 0), value=rubbish) for x in data]
        found.append(fit(padded, layout, see[None, None]))
    assert same(*found)
    for padded_frame, frame, x in zip(found[0], fit(data, layout), data[1:], strict=True):
        assert close_frames(padded_frame, frame, x)


@given(seed=seeds, pads=st.lists(st.integers(0, 60), min_size=2, max_size=3))
def test_what_stands_in_the_padding_of_a_batch_changes_no_byte(seed: int, pads: list[int]) -> None:
    batch = [torch.cat(x) for x in zip(*(draw(seed + n) for n in range(len(pads))), strict=True)]
    see = torch.arange(TOKENS) >= torch.tensor(pads)[:, None]
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril() & see[:, None, None]
    rubbish = [x.masked_fill(~see[:, None, :, None], 1e6) for x in batch]
    assert same(fit(batch, form(), mask), fit(rubbish, form(), mask))


@pytest.mark.parametrize("rubbish", [500.0, 1e12])
def test_a_row_of_padding_alone_changes_nothing(rubbish: float) -> None:
    data, layout = draw(0), form()
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(2, 1, -1, -1).clone()
    mask[1] = False
    found = [
        fit([torch.cat([x, torch.full_like(x, fill)]) for x in data], layout, mask)
        for fill in (0.0, rubbish)
    ]
    for with_row, frame, x in zip(found[0], fit(data, layout), data[1:], strict=True):
        assert close_frames(with_row, frame, x)
    assert same(*found)


# ---------------------------------------------------------------- turns


def rotated(x: Tensor, by: Tensor, pairs: list[tuple[int, int]], rate: Tensor) -> Tensor:
    """RoPE in float64, pair by pair: each pair a complex number, multiplied by exp(i angle)."""
    y = x.double().clone()
    for (a, b), speed in zip(pairs, rate.tolist(), strict=True):
        z = torch.complex(x[..., a].double(), x[..., b].double())
        z = z * torch.polar(torch.ones_like(by, dtype=torch.float64), by.double() * speed)
        y[..., a], y[..., b] = z.real, z.imag
    return y


@pytest.mark.parametrize("plan", [half_split_plan, interleaved_plan])
@given(seed=seeds, dim=st.sampled_from(HEAD_DIMS), part=st.sampled_from([0.25, 0.5, 1.0]))
def test_a_plan_is_the_rotary_embedding_and_turns_back(plan, seed: int, dim: int, part) -> None:
    turned = int(dim * part)
    rate = speeds(turned)
    n = len(rate)
    split = plan is half_split_plan
    pairs = [(i, i + n) if split else (2 * i, 2 * i + 1) for i in range(n)]
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 7, dim, generator=g)
    by = torch.randint(-3000, 3000, (7,), generator=g)
    tensor = plan(rate, dim)
    got = turn(x, by, tensor)
    # The angle is a float32 product: off by its last bit.
    room = EPS * (by.abs().amax() + 8) * x.abs().max() * 2
    assert (got - rotated(x, by, pairs, rate)).abs().max() < room
    assert torch.equal(got[..., turned:], x[..., turned:])
    torch.testing.assert_close(turn(got, -by, tensor), x, rtol=0, atol=16 * EPS * x.abs().max())
    torch.testing.assert_close(got.norm(dim=-1), x.norm(dim=-1))


@given(seed=seeds, shift=st.integers(0, 500), dim=st.sampled_from(HEAD_DIMS))
def test_turning_both_sides_alike_changes_no_logit(seed: int, shift: int, dim: int) -> None:
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 5, dim, generator=g, dtype=torch.float64)
    plan, by = half_split_plan(speeds(dim), dim).double(), torch.full((5,), shift)
    logits = turn(q, by, plan) @ turn(k, by, plan).T
    assert (logits - q @ k.T).abs().max() < 1e-5 * math.sqrt(dim) * q.norm() * k.norm()


@given(i=st.integers(0, 4000), sinks=st.integers(0, 9), pages=st.integers(1, 16))
def test_a_block_starts_at_its_first_token(i: int, sinks: int, pages: int) -> None:
    layout = Layout("digits", 64, 4096, 8, sinks, 32, 8, (Digits(64, 64),), block=8 * pages)
    assert block_start(torch.tensor(i), layout) == sinks + i // (8 * pages) * (8 * pages)
    assert block_start(torch.tensor(i), form(0)) == 0
