"""Bytes of a page, packing, and the arithmetic of codes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skv_compile.config import HEAD_DIMS
from skv_compile.lowering import codes
from skv_compile.lowering.grid import grid_frame
from skv_compile.lowering.hadamard import rotation
from skv_compile.lowering.layout import EXACT_DTYPES, Digits, Layout

CPU = torch.device("cpu")

page_tokens = st.integers(1, 32).map(lambda n: 8 * n)
small = st.integers(0, 300)


@st.composite
def some_tiers(draw) -> tuple[Digits, ...]:
    """One to five tiers, coarse to fine, whose digits are at most eight times the least."""
    least = draw(st.integers(1, 6))
    counts = st.integers(least, 8 * least).map(lambda n: 8 * n)
    found = draw(st.lists(st.builds(Digits, counts, counts), min_size=1, max_size=5))
    return tuple(sorted(found, key=sum))


@st.composite
def layouts(draw, tracked: bool | None = None) -> Layout:
    size = draw(page_tokens)
    common = (
        draw(st.sampled_from(HEAD_DIMS)),
        draw(st.integers(1, 100_000)),
        size,
        draw(small),
        draw(small),
    )
    kind = draw(st.sampled_from(["exact", "digits"]))
    tiers = draw(some_tiers()) if kind == "digits" else (Digits(0, 0),)
    unit = draw(st.integers(0, len(tiers) - 1))
    if tracked is None:
        tracked = draw(st.booleans())
    more = {"block": draw(small), "calibrate": draw(small), "observed": draw(small)}
    if not tracked:
        tiers, unit, stride = tiers[:1], 0, size
    else:
        stride = draw(st.integers(1, 300))
    dtype = draw(st.sampled_from(sorted(EXACT_DTYPES)))
    return Layout(kind, *common, stride, tiers, unit, tracked, **more, dtype=dtype)


@given(layouts())
def test_fields_follow_one_another_and_cover_the_page(layout: Layout) -> None:
    for tier, fields in enumerate(layout.fields):
        end = 0
        for field in sorted(fields.values(), key=lambda field: field.offset):
            assert field.offset == end
            assert field.size > 0
            end += field.size
        # Pages of all tiers have the same bytes; what is left over has no room for a token.
        assert 0 <= layout.page_bytes - end < layout.record_bytes[tier]
        assert end == layout.page_bytes or tier != layout.unit
    assert layout.capacity[layout.unit] == layout.page_tokens


@given(layouts())
def test_every_field_has_whole_bytes_a_token_and_room_for_its_content(layout: Layout) -> None:
    for digits, tokens, fields, record in zip(
        layout.tiers, layout.capacity, layout.fields, layout.record_bytes, strict=True
    ):
        per_token = {name: field.size / tokens for name, field in fields.items()}
        if layout.kind == "exact":
            item = torch.empty((), dtype=EXACT_DTYPES[layout.dtype]).element_size()
            want = {"keys": layout.head_dim * item, "values": layout.head_dim * item}
        else:
            want = {
                "key_digits": digits.key * 2 / 8,
                "value_digits": digits.value * 2 / 8,
                "key_radius": 1,
                "value_radius": 1,
            }
        if layout.tracked:
            want |= {"gap": 1, "score": 1}
        assert per_token == want
        assert record == sum(want.values())


@given(layouts())
def test_the_rate_counts_every_byte_of_a_page(layout: Layout) -> None:
    # Two int32 that describe a page of chosen tokens, and one in the list of free pages.
    size = layout.page_bytes + (12 if layout.tracked else 0)
    for tier, tokens in enumerate(layout.capacity):
        coordinates = 2 * tokens * layout.head_dim
        assert layout.rate(tier) == pytest.approx(8 * size / coordinates)


@given(layouts())
def test_a_key_says_everything_about_a_layout(layout: Layout) -> None:
    assert Layout.parse(layout.key) == layout


@given(layouts(), layouts())
def test_different_layouts_have_different_keys(one: Layout, other: Layout) -> None:
    assert (one == other) == (one.key == other.key)


@given(layouts(tracked=False))
def test_pages_and_exact_slots_hold_all_tokens(layout: Layout) -> None:
    """The ring never holds more than recent + a page when the pages take what is due."""
    beyond = layout.max_tokens - layout.sinks - layout.max_pages * layout.page_tokens
    assert beyond <= layout.recent + layout.page_tokens
    assert layout.exact_slots == layout.sinks + layout.recent + layout.page_tokens


@given(layouts(tracked=True), st.data())
def test_pages_of_chosen_tokens_hold_all_tokens_in_whatever_tiers(layout: Layout, data) -> None:
    left, pages = max(0, layout.max_tokens - layout.sinks - layout.recent), 0
    for tokens in layout.capacity[:-1]:
        part = data.draw(st.integers(0, left))
        left, pages = left - part, pages + math.ceil(part / tokens)
    assert pages + math.ceil(left / layout.capacity[-1]) <= layout.max_pages
    assert layout.exact_slots == layout.sinks + layout.recent + layout.stride


@given(layouts())
def test_the_digits_of_all_tiers_follow_one_another(layout: Layout) -> None:
    end = Digits(0, 0)
    for tier, digits in enumerate(layout.tiers):
        assert layout.digits_before(tier) == end
        end = Digits(end.key + digits.key, end.value + digits.value)


# ---------------------------------------------------------------- digits


def test_packing_loses_no_digit_of_any_word() -> None:
    words = torch.arange(2**16)
    digits = torch.stack([(words >> 2 * n) & 3 for n in range(8)], -1)
    packed = codes.pack_digits(digits)
    assert packed.shape == (2**16, 2)
    assert torch.equal(codes.unpack_digits(packed).long(), digits)
    # Little-endian int16 words, the first digit in the lowest bits.
    low, high = packed.long().unbind(-1)
    assert torch.equal(low | high << 8, words)


@given(st.integers(1, 4), st.integers(1, 40), st.integers(0, 2**31))
def test_unpacking_inverts_packing_for_every_shape(rows: int, words: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    digits = torch.randint(0, 4, (rows, 3, 8 * words), generator=generator).to(torch.uint8)
    assert torch.equal(codes.unpack_digits(codes.pack_digits(digits)), digits)


@pytest.mark.parametrize("count", [1, 4, 12])
def test_digits_that_fill_no_word_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="do not fill words of 8"):
        codes.pack_digits(torch.zeros(2, count))


# ---------------------------------------------------------------- radius


def test_every_radius_code_survives_decoding_and_encoding() -> None:
    every = torch.arange(256).to(torch.uint8)
    assert torch.equal(codes.encode_radius(codes.decode_radius(every)), every)
    assert codes.decode_radius(every)[0] == 0
    assert codes.decode_radius(every)[-1] == pytest.approx(codes.largest_radius(), rel=1e-6)


@given(st.floats(min_value=2**-7.9, max_value=2**7.9))
def test_a_radius_is_off_by_at_most_half_a_step(r: float) -> None:
    back = codes.decode_radius(codes.encode_radius(torch.tensor(r, dtype=torch.float64))).item()
    assert abs(math.log2(back / r)) <= 1 / 32 + 1e-6


def test_radii_beyond_the_range_saturate_and_zero_stays_zero() -> None:
    zero, tiny, huge = codes.decode_radius(codes.encode_radius(torch.tensor([0.0, 1e-30, 1e30])))
    smallest = 2.0 ** ((1 - codes.RADIUS_ZERO) / codes.RADIUS_STEPS_PER_OCTAVE)
    assert zero == 0
    assert 0 <= tiny <= smallest * (1 + 1e-6)
    assert huge.item() == pytest.approx(codes.largest_radius())


# ---------------------------------------------------------------- vectors


@pytest.mark.parametrize("dim", [*HEAD_DIMS, 48, 112, 192])
def test_rotations_are_orthogonal_and_the_same_every_time(dim: int) -> None:
    turn = rotation(dim)
    identity = torch.eye(dim, dtype=torch.float64)
    assert (turn @ turn.T - identity).abs().max() < 1e-12
    rotation.cache_clear()
    assert torch.equal(rotation(dim), turn)


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_a_rotation_spreads_one_coordinate_over_all(dim: int) -> None:
    power_of_two = dim & (dim - 1) == 0
    largest = math.sqrt((1 if power_of_two else 2) / dim)
    assert rotation(dim).abs().max() <= largest * (1 + 1e-12)


def plain_grid(x: torch.Tensor, dim: int, digits: int) -> torch.Tensor:
    """The least-squares grid code of a vector in float64, without frames, digits or packing."""
    step, levels = {1: 0.9957, 2: 0.3352}[digits], 4**digits
    turn = rotation(dim)
    z = x.double() @ turn
    scale = z.square().mean(-1, keepdim=True).sqrt()
    code = torch.floor(z / (scale * step) + levels / 2).clamp(0, levels - 1)
    zh = step * (code - (levels - 1) / 2)
    r = (z * zh).sum(-1, keepdim=True) / zh.square().sum(-1, keepdim=True)
    return (r * zh) @ turn.T


def formula(digits: torch.Tensor, radius: torch.Tensor, frame: codes.Frame) -> torch.Tensor:
    """What digits mean, in float64: codes by ``plan``, levels by ``grid``, ``into`` undone."""
    heads = []
    for h in range(len(frame.into)):
        dims, shifts = frame.plan[h].long()
        step, levels, _ = frame.grid[h].double()
        code = torch.zeros(*digits[:, h].shape[:-1], len(step), dtype=torch.int64)
        code.index_add_(-1, dims, digits[:, h].long() << shifts)
        z = radius[:, h, :, None].double() * step * (code - (levels - 1) / 2)
        heads.append(z @ torch.linalg.inv(frame.into[h].double()) + frame.out[h, -1].double())
    return torch.stack(heads, 1)


def scaled_vectors(dim: int, heads: int = 3) -> torch.Tensor:
    return torch.randn(2, heads, 200, dim) * torch.logspace(-1, 1, 200)[:, None]


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_decoding_undoes_plan_grid_and_rotation(dim: int, digits: int) -> None:
    frame = grid_frame(3, dim, digits * dim, CPU)
    x = scaled_vectors(dim)
    d, r = codes.encode(x, frame, unbiased=False)
    assert d.shape == (2, 3, 200, digits * dim)
    got, want = codes.decode(d, r, frame).double(), formula(d, r, frame)
    # float32 sums of ``digits * dim`` products
    bound = torch.finfo(torch.float32).eps * digits * dim
    assert ((got - want).norm(dim=-1) <= bound * want.norm(dim=-1)).all()


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_a_code_is_no_worse_than_the_plain_grid(dim: int, digits: int) -> None:
    frame = grid_frame(3, dim, digits * dim, CPU)
    x = scaled_vectors(dim)
    got = codes.decode(*codes.encode(x, frame, unbiased=False), frame).double()
    error = (got - x.double()).norm(dim=-1)
    plain = (plain_grid(x, dim, digits) - x.double()).norm(dim=-1)
    # A coordinate at the edge of two cells may round either way: not for every vector.
    assert (error <= plain * (1 + 1e-5)).float().mean() > 0.98
    assert error.mean() <= plain.mean()


@pytest.mark.parametrize(("digits", "mse"), [(1, 0.1188), (2, 0.01154)])
def test_the_grid_reaches_the_known_error_on_normal_data(digits: int, mse: float) -> None:
    """J. Max, 1960: uniform quantisers of 4 and 16 levels on a unit normal."""
    x = torch.randn(1, 1, 20_000, 128)
    frame = grid_frame(1, 128, digits * 128, CPU)
    error = (codes.decode(*codes.encode(x, frame, unbiased=False), frame) - x).square().mean()
    # A step chosen for every vector gains a little.
    assert error < 1.01 * mse
    assert error > 0.85 * mse


@pytest.mark.parametrize("digits", [1, 2])
def test_keys_keep_their_length_along_themselves_where_the_code_is_good(digits: int) -> None:
    x = torch.randn(1, 2, 300, 64)
    frame = grid_frame(2, 64, digits * 64, CPU)
    unbiased = codes.encode(x, frame, unbiased=True)
    squares = codes.encode(x, frame, unbiased=False)
    assert torch.equal(unbiased[0], squares[0])
    ratio = unbiased[1] / squares[1]
    assert (ratio >= 1 - 1e-5).all()
    capped = ratio >= codes.UNBIASED_CAP * (1 - 1e-5)
    assert (ratio <= codes.UNBIASED_CAP * (1 + 1e-5)).all()
    along = (codes.decode(*unbiased, frame) * x).sum(-1) / x.square().sum(-1)
    torch.testing.assert_close(along[~capped], torch.ones_like(along[~capped]), rtol=1e-5, atol=0)
    assert (along[capped] <= 1 + 1e-5).all()
    assert capped.float().mean() < 0.05


@pytest.mark.parametrize("unbiased", [True, False])
def test_zero_vectors_and_single_spikes_are_coded(unbiased: bool) -> None:
    x = torch.zeros(1, 1, 65, 64)
    x[0, 0, 1:] = torch.eye(64) * 10
    frame = grid_frame(1, 64, 128, CPU)
    back = codes.decode(*codes.encode(x, frame, unbiased=unbiased), frame)[0, 0]
    assert torch.equal(back[0], torch.zeros(64))
    assert torch.isfinite(back).all()
    assert ((back[1:] - x[0, 0, 1:]).norm(dim=-1) < 0.2 * 10).all()


def test_the_coarse_code_is_the_first_digits_of_a_fine_one() -> None:
    """Digits come most significant first, so that a prefix is a coarser code."""
    fine = grid_frame(1, 64, 128, CPU)
    x = torch.randn(1, 1, 500, 64)
    d, r = codes.encode(x, fine, unbiased=False)
    prefix = codes.decode(d[..., :64], r, fine._replace(plan=fine.plan[..., :64]))
    assert torch.nn.functional.cosine_similarity(prefix, x, dim=-1).min() > 0.8
