"""Demotion: which codes are cut off, which are coded anew, and what either of them reads as."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from test_frame import fit, layout, prompt
from torch import Tensor

from skv_compile.codec.demotion import demote, truncate, truncate_frame, truncates
from skv_compile.codec.tiers import tiers
from skv_compile.config import HEAD_DIMS, Config
from skv_compile.lowering import codes
from skv_compile.lowering.grid import grid_frame

CPU = torch.device("cpu")
DATA = prompt(1024)
UNBIASED = {"key": True, "value": False}
HALF_STEP = 2 ** (1 / 32)  # what the 8-bit radius may be off by


def side_data(side: str) -> Tensor:
    return DATA[1] if side == "key" else DATA[2]


def side_frame(side: str, digits: int) -> codes.Frame:
    return fit(DATA, layout(digits=digits, block=0))[0 if side == "key" else 1]


def coded(side: str, frame: codes.Frame) -> tuple[Tensor, Tensor]:
    digits, radius = codes.encode(side_data(side), frame, unbiased=UNBIASED[side])
    return codes.pack_digits(digits), codes.encode_radius(radius)


def read(packed: Tensor, radius: Tensor, frame: codes.Frame) -> Tensor:
    return codes.decode(codes.unpack_digits(packed), codes.decode_radius(radius), frame)


def white(x: Tensor, frame: codes.Frame) -> Tensor:
    """In the frame's coordinates, scaled so that squared lengths weigh as its errors do."""
    z = (x.double() - frame.out[:, -1:].double()) @ frame.into.double()
    return z * frame.grid[:, 2].double().sqrt().unsqueeze(-2)


# ---------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("side", "have", "want", "cut"),
    [
        ("key", 64, 48, True),
        ("key", 64, 32, False),
        ("key", 48, 32, False),
        ("key", 96, 64, False),
        ("key", 128, 96, False),
        ("value", 64, 48, True),
        ("value", 64, 32, True),
        ("value", 48, 32, True),
        ("value", 96, 64, False),
        ("value", 128, 64, False),
        ("key", 96, 96, True),
    ],
)
def test_codes_are_cut_where_it_costs_little(side: str, have: int, want: int, cut: bool) -> None:
    assert truncates(side, have, want, 64) is cut
    assert truncates(side, 2 * have, 2 * want, 128) is cut


@pytest.mark.parametrize("want", [0, -8, 4, 36])
def test_counts_that_fill_no_words_are_refused(want: int) -> None:
    packed, frame = torch.zeros(1, 1, 2, 16, dtype=torch.uint8), grid_frame(1, 64, 64, CPU)
    for call in (
        lambda: truncates("key", 64, want, 64),
        lambda: truncate(packed, want),
        lambda: truncate_frame(frame, want),
    ):
        with pytest.raises(ValueError, match="do not fill words of 8"):
            call()


def test_more_digits_than_there_are_are_refused() -> None:
    packed, frame = torch.zeros(1, 1, 2, 16, dtype=torch.uint8), grid_frame(1, 64, 64, CPU)
    radius = torch.zeros(1, 1, 2, dtype=torch.uint8)
    for call in (
        lambda: truncates("key", 64, 72, 64),
        lambda: truncate(packed, 72),
        lambda: truncate_frame(frame, 72),
        lambda: demote(packed, radius, "key", frame, grid_frame(1, 64, 72, CPU)),
    ):
        with pytest.raises(ValueError, match=r"64 digits has no 72 of them.*only goes down"):
            call()


def test_an_unknown_side_and_a_foreign_frame_are_refused() -> None:
    frame, radius = grid_frame(1, 64, 64, CPU), torch.zeros(1, 1, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="'keys'; it is one of 'key', 'value'"):
        truncates("keys", 64, 48, 64)
    with pytest.raises(ValueError, match="codes of 96 digits in a frame of 64"):
        demote(torch.zeros(1, 1, 2, 24, dtype=torch.uint8), radius, "key", frame, frame)


# ---------------------------------------------------------------- cutting


@pytest.mark.parametrize("digits", [8, 48, 64, 120, 128])
@pytest.mark.parametrize("side", UNBIASED)
def test_a_cut_code_reads_as_the_whole_with_its_missing_digits_at_their_centre(
    side: str, digits: int
) -> None:
    frame = side_frame(side, 128)
    packed, radius = coded(side, frame)
    short = truncate(packed, digits)
    whole = codes.unpack_digits(packed).float()
    assert torch.equal(codes.unpack_digits(short).float(), whole[..., :digits])
    whole[..., digits:] = 1.5
    want = codes.decode(whole, codes.decode_radius(radius), frame)
    got = read(short, radius, truncate_frame(frame, digits))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("digits", [8, 48, 64, 120])
@pytest.mark.parametrize("side", UNBIASED)
def test_a_cut_frame_encodes_what_cutting_gives(side: str, digits: int, monkeypatch) -> None:
    """Its steps, levels and shifts are a grid of their own: the one with fewer digits."""
    frame = side_frame(side, 128)
    short = truncate_frame(frame, digits)
    for (dims, shifts), levels in zip(short.plan, short.grid[:, 1], strict=True):
        for d in range(64):
            mine = shifts[dims == d].tolist()
            assert mine == [2 * n for n in reversed(range(len(mine)))]
            assert levels[d] == 4 ** len(mine)
    monkeypatch.setattr(codes, "GAINS", (1.0,))
    whole, _ = codes.encode(side_data(side), frame, unbiased=False)
    own, _ = codes.encode(side_data(side), short, unbiased=False)
    assert torch.equal(own, whole[..., :digits])


def test_cutting_twice_is_cutting_once_and_leaves_its_input_alone() -> None:
    frame = side_frame("value", 128)
    packed, _ = coded("value", frame)
    before, old = packed.clone(), [x.clone() for x in frame]
    assert torch.equal(truncate(truncate(packed, 96), 32), truncate(packed, 32))
    twice = truncate_frame(truncate_frame(frame, 96), 32)
    for one, other in zip(twice, truncate_frame(frame, 32), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(truncate_frame(frame, 128), frame, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(packed, before)
    assert all(torch.equal(a, b) for a, b in zip(frame, old, strict=True))


# ---------------------------------------------------------------- demotion

PAIRS = [("key", 64, 48), ("value", 64, 48), ("value", 64, 32), ("value", 48, 32)]
ANEW = [("key", 64, 32), ("key", 96, 64), ("key", 128, 96), ("value", 96, 64), ("value", 128, 96)]


@pytest.mark.parametrize(("side", "have", "want"), PAIRS)
def test_a_cut_costs_little_and_its_radius_is_fitted(side: str, have: int, want: int) -> None:
    high, low, x = side_frame(side, have), side_frame(side, want), side_data(side)
    packed, radius = coded(side, high)
    short, fitted, frame = demote(packed, radius, side, high, low)
    assert torch.equal(short, truncate(packed, want))
    assert fitted.dtype == torch.uint8
    assert frame.out.shape == low.out.shape

    def error(*code) -> float:
        return (white(read(*code), low) - white(x, low)).square().mean().item()

    assert error(short, fitted, frame) < 1.35 * error(*coded(side, low), low)
    # Against the vectors that the whole code stood for, as the side's radii are fitted.
    old, new = white(read(packed, radius, high), high), white(read(short, fitted, frame), high)
    kept = white(read(short, radius, frame), high)
    if side == "value":
        least = (new - old).square().sum(-1), (kept - old).square().sum(-1)
        assert (least[0] <= 1.02 * least[1]).all()
        assert least[0].sum() < least[1].sum()
        # No multiple of the new vector is nearer, but for the coding of the radius.
        along = (new * old).sum(-1) / new.square().sum(-1)
        assert (along.log2().abs() < 1.3 / 32).all()
    else:
        along = (new * old).sum(-1) / old.square().sum(-1)
        assert (along < HALF_STEP * 1.01).all()
        assert (along > 1 / HALF_STEP / 1.01).float().mean() > 0.95  # the others are capped


@pytest.mark.parametrize(("side", "have", "want"), ANEW)
def test_elsewhere_codes_are_made_anew_in_the_lower_frame(side: str, have: int, want: int) -> None:
    high, low = side_frame(side, have), side_frame(side, want)
    packed, radius = coded(side, high)
    got, size, frame = demote(packed, radius, side, high, low)
    assert frame is low
    assert got.shape[-1] == want // 4
    digits, fitted = codes.encode(read(packed, radius, high), low, unbiased=UNBIASED[side])
    same = (codes.unpack_digits(got) == digits).all(-1)
    assert same.float().mean() > 0.99
    assert (size.int() - codes.encode_radius(fitted).int()).abs()[same].max() <= 1
    x = side_data(side)
    direct = (white(read(*coded(side, low), low), low) - white(x, low)).square().mean()
    assert (white(read(got, size, low), low) - white(x, low)).square().mean() < 1.5 * direct


def test_values_go_down_step_by_step_in_the_frame_they_began_in() -> None:
    high = side_frame("value", 64)
    packed, radius = coded("value", high)
    middle = demote(packed, radius, "value", high, side_frame("value", 48))
    short, fitted, frame = demote(*middle[:2], "value", middle[2], side_frame("value", 32))
    assert torch.equal(short, truncate(packed, 32))
    at_once = demote(packed, radius, "value", high, side_frame("value", 32))
    assert all(torch.equal(a, b) for a, b in zip(frame, at_once[2], strict=True))
    assert (fitted.int() - at_once[1].int()).abs().max() <= 2


def test_the_same_tier_is_no_demotion() -> None:
    frame = side_frame("key", 96)
    packed, radius = coded("key", frame)
    got = demote(packed, radius, "key", frame, side_frame("key", 96))
    assert got[0] is packed
    assert got[1] is radius
    assert got[2] is frame


@pytest.mark.parametrize("want", [32, 64])
@pytest.mark.parametrize("side", UNBIASED)
def test_zero_stays_zero_and_garbage_stays_finite(side: str, want: int) -> None:
    high, low = side_frame(side, 64 if want == 32 else 96), side_frame(side, want)
    n = high.plan.shape[-1] // 4
    packed = torch.randint(0, 256, (3, 2, 40, n)).to(torch.uint8)
    radius = torch.randint(0, 256, (3, 2, 40)).to(torch.uint8)
    radius[:, :, ::4] = 0
    code = demote(packed, radius, side, high, low)
    assert torch.isfinite(read(*code)).all()
    if truncates(side, 4 * n, want, 64):
        assert torch.equal(code[1] == 0, radius == 0)


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_every_frame_tier_demotes_to_the_next(dim: int) -> None:
    data = prompt(256, dim=dim, heads=1)
    counts = [t.layout.key_digits for t in tiers(Config(codec="frame"), dim, 4096, "float32")]
    counts = [n for n in counts if n % 8 == 0]
    for low_count, high_count in pairwise(counts):
        pairs = zip(*(fit(data, layout(dim, n, 0)) for n in (high_count, low_count)), strict=True)
        for side, x, (high, low) in zip(UNBIASED, data[1:], pairs, strict=True):
            digits, radius = codes.encode(x, high, unbiased=UNBIASED[side])
            code = codes.pack_digits(digits), codes.encode_radius(radius)
            back = read(*demote(*code, side, high, low))
            assert (back - x).norm() < 0.8 * (x - x.mean(2, keepdim=True)).norm()
