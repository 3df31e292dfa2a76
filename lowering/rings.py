"""Rings: pairs of coordinates as a ring and an angle on it.

Ring i of a book holds ``counts[i]`` cells at equal angles on a circle of radius ``radii[i]``;
``edges`` part the rings by the length of the pair. A cell's number is its ring's offset plus
the rounded angle. The books minimise the squared error on a pair of unit normals
(an unrestricted polar quantiser: S. Wilson, Magnitude/phase quantization of independent
Gaussian variates, 1980; these numbers come from a descent over the counts).

Reading a cell is a table look-up, which costs little where bytes can be shuffled (CPU) and
much on a GPU. A cell of 4, 6 or 8 bits is stored as two, three or four 2-bit digits.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .codes import Frame, best_gain, pack_digits, radius_of, unpack_digits
from .hadamard import rotation


class Book(NamedTuple):
    counts: tuple[int, ...]
    radii: tuple[float, ...]
    edges: tuple[float, ...]


#: By digits a cell. Squared error per coordinate: .1093, .0306, .0080.
BOOKS = {
    2: Book((1, 6, 9), (0.0, 0.9075, 1.9008), (0.4752, 1.4006)),
    3: Book(
        (5, 10, 15, 18, 16),
        (0.3299, 0.765, 1.2474, 1.8238, 2.6068),
        (0.5367, 0.9991, 1.536, 2.2367),
    ),
    4: Book(
        (3, 9, 15, 20, 25, 29, 33, 34, 34, 31, 23),
        (0.1116, 0.3187, 0.5389, 0.7658, 1.0033, 1.2566, 1.533, 1.8423, 2.2027, 2.6537, 3.295),
        (0.2026, 0.424, 0.6501, 0.8827, 1.1291, 1.3941, 1.6893, 2.0254, 2.4358, 3.001),
    ),
}


@cache
def _tables(digits: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points [cells, 2], edges, counts and offsets of a book."""
    book = BOOKS[digits]
    counts = torch.tensor(book.counts)
    ring = torch.arange(len(counts)).repeat_interleave(counts)
    offsets = counts.cumsum(0) - counts
    angle = 2 * torch.pi * (torch.arange(len(ring)) - offsets[ring]) / counts[ring]
    points = torch.stack([angle.cos(), angle.sin()], 1) * torch.tensor(book.radii)[ring, None]
    tables = (points.float(), torch.tensor(book.edges), counts, offsets)
    return tuple(x.to(device) for x in tables)


@lru_cache(maxsize=64)
def ring_frame(heads: int, dim: int, device: torch.device) -> Frame:
    """The frame of ring codes: a Hadamard rotation without centre."""
    into = rotation(dim).float()
    back = torch.cat([into.T, torch.zeros(1, dim)])
    parts = (into, back, torch.ones(3, dim), torch.zeros(2, 0, dtype=torch.uint8))
    return Frame(*(x.expand(heads, *x.shape).contiguous().to(device) for x in parts))


def encode_rings(x: Tensor, frame: Frame, digits: int, *, unbiased: bool) -> tuple[Tensor, Tensor]:
    """[B, H, n, D] -> bytes [B, H, n, D * digits / 8] and radii [B, H, n].

    ``digits``: 2, 3 or 4 digits a cell, for 16, 64 or 256 cells.
    """
    z = torch.matmul(x.float() - frame.centre, frame.into)
    points, edges, counts, offsets = _tables(digits, x.device)

    def quantise(unit: Tensor) -> tuple[Tensor, Tensor]:
        pairs = unit.unflatten(-1, (-1, 2))
        ring = torch.bucketize(pairs.norm(dim=-1), edges)
        n = counts[ring]
        turn = torch.atan2(pairs[..., 1], pairs[..., 0]) / (2 * torch.pi)
        cell = offsets[ring] + (turn * n).round().long() % n
        return cell, points[cell].flatten(-2)

    cell, zh = best_gain(z, torch.ones_like(z[..., :1, :]), quantise)
    radius = radius_of(z, zh, torch.ones_like(z[..., :1, :]), unbiased)
    places = torch.arange(digits, device=x.device) * 2
    return pack_digits(((cell.unsqueeze(-1) >> places) & 3).flatten(-2)), radius


def ring_values(packed: Tensor, digits: int) -> Tensor:
    """Bytes [..., D * digits / 8] -> unit vectors [..., D] float32."""
    places = torch.arange(digits, device=packed.device) * 2
    cell = (unpack_digits(packed).unflatten(-1, (-1, digits)).long() << places).sum(-1)
    return _tables(digits, packed.device)[0][cell].flatten(-2)
