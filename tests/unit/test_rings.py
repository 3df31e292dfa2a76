"""Rings: every cell, the known errors, and bytes that no encoder wrote."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import layer_state

from skv_compile.config import HEAD_DIMS
from skv_compile.lowering import codes, rings
from skv_compile.lowering.reference.pages import decode_records, page_records

CPU = torch.device("cpu")
SIZES = [2, 3, 4]  # digits a cell: 16, 64 and 256 cells
MSE = {2: 0.1093, 3: 0.0306, 4: 0.0080}


def book_points(digits: int) -> torch.Tensor:
    """[cells, 2] float64 from the book's definition: ring after ring, angle after angle."""
    book = rings.BOOKS[digits]
    points = [
        torch.polar(torch.tensor(radius).double(), torch.tensor(2 * torch.pi * n / count).double())
        for count, radius in zip(book.counts, book.radii, strict=True)
        for n in range(count)
    ]
    return torch.view_as_real(torch.stack(points))


def packed_cells(cells: torch.Tensor, digits: int) -> torch.Tensor:
    """Cell numbers [..., n] as bytes: one little-endian bit string, 2 * digits bits a cell."""
    bits = (cells.unsqueeze(-1) >> torch.arange(2 * digits)) & 1
    return (bits.flatten(-2).unflatten(-1, (-1, 8)) << torch.arange(8)).sum(-1).to(torch.uint8)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain quantiser: no choice of gain."""
    monkeypatch.setattr(codes, "GAINS", (1.0,))


def frame_without_rotation(dim: int) -> codes.Frame:
    into = torch.eye(dim)[None]
    back = torch.cat([into, torch.zeros(1, 1, dim)], 1)
    return codes.Frame(into, back, torch.ones(1, 3, dim), torch.zeros(1, 2, 0, dtype=torch.uint8))


@pytest.mark.parametrize("digits", SIZES)
def test_a_book_is_a_partition_of_the_plane(digits: int) -> None:
    book = rings.BOOKS[digits]
    assert sum(book.counts) == 4**digits
    assert len(book.radii) == len(book.counts) == len(book.edges) + 1
    for inner, edge, outer in zip(book.radii[:-1], book.edges, book.radii[1:], strict=True):
        assert inner < edge < outer
        assert abs(edge - (inner + outer) / 2) < 0.3 * (outer - inner)


@pytest.mark.parametrize("digits", SIZES)
def test_bytes_decode_to_the_points_of_the_book(digits: int) -> None:
    cells = torch.arange(4**digits)
    got = rings.ring_values(packed_cells(cells, digits), digits)
    want = book_points(digits).flatten()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=4e-6)  # float32 angles


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("digits", SIZES)
def test_every_point_of_a_book_is_its_own_code(digits: int) -> None:
    """All points in one vector, so scaled that it has the unit mean square of the books."""
    points = book_points(digits).float().flatten()
    rest = (2 * len(points) - points.square().sum()) / len(points)
    assert rest > 0  # cells are wider than the data they stand for: pad up to the unit size
    filler = torch.full_like(points, rest.sqrt().item())
    x = torch.cat([points, filler])[None, None, None]
    frame = frame_without_rotation(x.shape[-1])
    packed, _ = rings.encode_rings(x, frame, digits, unbiased=False)
    want = packed_cells(torch.arange(4**digits), digits)
    assert torch.equal(packed[0, 0, 0, : len(want)], want)


@pytest.mark.parametrize("digits", SIZES)
def test_the_cell_is_the_nearest_point_nearly_always(digits: int) -> None:
    """Rings first, then the angle, as Wilson's quantiser does: off only near a ring's edge."""
    x = torch.randn(500, 64)
    packed, radius = rings.encode_rings(
        x[None, None], frame_without_rotation(64), digits, unbiased=False
    )
    z = (x / radius[0, 0, :, None]).unflatten(-1, (-1, 2))
    got = (rings.ring_values(packed[0, 0], digits).unflatten(-1, (-1, 2)) - z).norm(dim=-1)
    nearest = torch.cdist(z, book_points(digits).float()).amin(-1)
    assert (got >= nearest - 1e-3).all()
    assert got.square().mean() < 1.1 * nearest.square().mean()


def codes_to_vectors(packed: torch.Tensor, radius: torch.Tensor, digits: int) -> torch.Tensor:
    values = rings.ring_values(packed, digits)
    frame = rings.ring_frame(values.shape[1], values.shape[-1], CPU)
    return values @ frame.out[:, :-1] * radius[..., None]


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("digits", SIZES)
def test_the_error_on_normal_data_is_the_known_one(digits: int) -> None:
    x = torch.randn(1, 1, 4000, 256)
    frame = rings.ring_frame(1, 256, CPU)
    packed, radius = rings.encode_rings(x, frame, digits, unbiased=False)
    error = (codes_to_vectors(packed, radius, digits) - x).square().mean()
    assert error.item() == pytest.approx(MSE[digits], rel=0.03)


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("digits", SIZES)
def test_radii_of_a_book_are_the_centroids_of_their_rings(digits: int) -> None:
    """Lloyd's condition: a ring's radius is the mean of its data along their cell's angle."""
    x = torch.randn(1, 1, 4000, 256)
    packed, _ = rings.encode_rings(x, frame_without_rotation(256), digits, unbiased=False)
    points = rings.ring_values(packed, digits).unflatten(-1, (-1, 2))
    unit = (x / x.square().mean(-1, keepdim=True).sqrt()).unflatten(-1, (-1, 2))
    length = points.norm(dim=-1)
    along = (points * unit).sum(-1) / length.clamp(min=1e-9)
    for radius in rings.BOOKS[digits].radii:
        mine = (length - radius).abs() < 1e-4
        if radius > 0:
            assert along[mine].mean().item() == pytest.approx(radius, rel=0.02)


@pytest.mark.parametrize("digits", SIZES)
def test_a_gain_chosen_for_every_vector_only_helps(digits: int, monkeypatch) -> None:
    x = torch.randn(1, 1, 2000, 64)
    x[..., ::7, 3] *= 12  # one large coordinate
    frame = frame_without_rotation(64)

    def error() -> torch.Tensor:
        packed, radius = rings.encode_rings(x, frame, digits, unbiased=False)
        back = rings.ring_values(packed, digits) * radius[..., None]
        return (back - x).square().sum(-1)

    best = error()
    monkeypatch.setattr(codes, "GAINS", (1.0,))
    plain = error()
    assert (best <= plain * (1 + 1e-4)).all()
    assert best.mean() < 0.95 * plain.mean()


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("digits", SIZES)
def test_every_head_dim_round_trips_and_packs(digits: int, dim: int) -> None:
    x = torch.randn(2, 3, 40, dim) * torch.logspace(-2, 2, 40)[:, None]
    frame = rings.ring_frame(3, dim, CPU)
    packed, radius = rings.encode_rings(x, frame, digits, unbiased=False)
    assert packed.shape == (2, 3, 40, dim * digits // 8)
    assert packed.dtype == torch.uint8
    back = codes_to_vectors(packed, radius, digits)
    share = (back - x).square().sum(-1) / x.square().sum(-1)
    assert share.mean() < 1.1 * MSE[digits]
    # Coding what a code decodes to changes it by less than the code is off.
    again, size = rings.encode_rings(back, frame, digits, unbiased=False)
    redone = codes_to_vectors(again, size, digits)
    assert ((redone - back).square().sum(-1) / x.square().sum(-1)).mean() < MSE[digits]


@pytest.mark.parametrize("digits", SIZES)
def test_unbiased_radii_keep_the_length_along_the_vector(digits: int) -> None:
    x = torch.randn(1, 1, 300, 64)
    frame = rings.ring_frame(1, 64, CPU)
    squares = rings.encode_rings(x, frame, digits, unbiased=False)
    unbiased = rings.encode_rings(x, frame, digits, unbiased=True)
    assert torch.equal(squares[0], unbiased[0])
    along = (codes_to_vectors(*unbiased, digits) * x).sum(-1) / x.square().sum(-1)
    torch.testing.assert_close(along, torch.ones_like(along), rtol=1e-4, atol=0)
    assert (unbiased[1] >= squares[1] * (1 - 1e-5)).all()


@pytest.mark.parametrize("digits", SIZES)
@pytest.mark.parametrize("size", [0.0, 1e15, 1e-15])
def test_extreme_vectors_are_coded(size: float, digits: int) -> None:
    x = torch.randn(1, 2, 5, 64) * size
    frame = rings.ring_frame(2, 64, CPU)
    packed, radius = rings.encode_rings(x, frame, digits, unbiased=True)
    back = codes_to_vectors(packed, radius, digits)
    assert torch.isfinite(back).all()
    assert ((back - x).norm(dim=-1) <= 0.5 * x.norm(dim=-1)).all()


@given(st.sampled_from(SIZES), st.integers(0, 2**31))
def test_any_bytes_decode_to_points_of_the_book(digits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (3, 5, 6 * digits), generator=generator).to(torch.uint8)
    values = rings.ring_values(raw, digits)
    assert values.shape == (3, 5, 48)
    pairs = values.unflatten(-1, (-1, 2)).double()
    assert torch.cdist(pairs, book_points(digits)).amin(-1).max() < 1e-5
    every = torch.arange(256).to(torch.uint8)[:, None].expand(-1, digits)
    assert torch.isfinite(rings.ring_values(every, digits)).all()


@pytest.mark.parametrize("bits", [2.5, 3.5, 4.5])
def test_pages_of_garbage_decode(bits: float) -> None:
    """Memory that was never written is decoded with the rest and must not raise."""
    state = layer_state("rings", bits=bits, head_dim=80)
    pages = torch.randint(0, 256, (1, 2, 3, state.layout.page_bytes)).to(torch.uint8)
    records = page_records(pages, state.layout, 0)
    records = {name: x.flatten(2, 3) for name, x in records.items()}
    i = torch.arange(3 * state.layout.page_tokens)[None, None]
    for x in decode_records(records, i, state.tensors, state.layout, 0):
        assert torch.isfinite(x).all()
