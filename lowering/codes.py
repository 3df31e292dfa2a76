"""Vectors to direction codes and back: the arithmetic, without any layout.

A vector x of a head is ``x = m + r * (c - 1.5) @ out`` with a centre m of the head, a
radius r and a string of 2-bit digits c. A dimension of the frame that was given n digits
is a uniform mid-rise grid of 4**n levels; its digits enter with weights 4**(n-1) ... 1,
which ``out`` has folded in. So whoever reads codes needs no widths: keys need ``q @ out.T``
and the scalar ``q @ m``, values ``sum(p r (c - 1.5)) @ out + sum(p) m``, and every head runs
the same kernel whatever its own allocation is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import DIGIT_BITS, DIGITS_PER_WORD

#: An 8-bit log radius: 0 is a zero vector, code c > 0 stands for 2 ** ((c - 128) / 16).
RADIUS_STEPS_PER_OCTAVE = 16
RADIUS_ZERO = 128

#: What a token is worth, in 8 bits: 0 is nothing, code c > 0 stands for 2 ** ((c - 200) / 5).
SCORE_STEPS_PER_OCTAVE = 5
SCORE_ONE = 200

STORED = torch.bfloat16  # ``into`` and ``back`` of frames that every layer has of its own

UNBIASED_CAP = 1.3

#: Steps are tried at these multiples for every vector, and the best code kept: a vector with
#: one large coordinate wants a wider grid. The radius absorbs it; whoever reads pays nothing.
GAINS = (1.0, 0.85, 1.2, 1.5, 2.2)


class Frame(NamedTuple):
    """Where the directions of one layer's keys (or values) are coded, in one tier.

    ``into`` [H, D, D]: ``z = (x - m) @ into``.
    ``back`` [H, D + 1, D]: the inverse of ``into``; the last row is the centre m.
    ``grid`` [H, 3, D]: step (in units of the radius), levels, and weight in the radius fit.
    ``plan`` [H, 2, N] uint8: of digit g, its dimension and its shift in that dimension's code.

    ``into`` and ``back`` are float32, or bfloat16 where every layer has its own: ``back`` is
    then the inverse of the rounded ``into``, so that rounding costs next to nothing.
    """

    into: Tensor
    back: Tensor
    grid: Tensor
    plan: Tensor

    @property
    def centre(self) -> Tensor:
        """[H, 1, D] float32."""
        return self.back[:, -1:].float()

    @property
    def out(self) -> Tensor:
        """[H, N + 1, D] float32: digits to vectors; the last row is the centre."""
        back = self.back.float()
        return torch.cat([self.spread(back[:, :-1].mT).mT, back[:, -1:]], 1)

    def spread(self, x: Tensor) -> Tensor:
        """[..., H, R, D] per dimension -> [..., H, R, N] per digit, times its step and weight.

        ``q @ out[:N].T`` is ``spread(q @ back[:D].T)``, and the product is the same for all tiers.
        """
        if self.plan.shape[-1] == 0:  # rings: a dimension is a digit
            return x
        dims, shifts = self.plan.long().unbind(1)
        scale = self.grid[:, 0].gather(1, dims) * torch.exp2(shifts.float())
        index = dims.unsqueeze(-2).expand(*x.shape[:-1], -1)
        return x.gather(-1, index) * scale.unsqueeze(-2).to(x.dtype)


class Basis(NamedTuple):
    """The frames of all tiers: one transform, and for each tier its grid and plan.

    ``into``, ``back``: as in a frame. ``grid`` [H, T, 3, D]. ``plan`` [H, 2, sum of N].
    """

    into: Tensor
    back: Tensor
    grid: Tensor
    plan: Tensor

    def frame(self, tier: int, first: int, digits: int) -> Frame:
        """The frame of a tier whose ``digits`` digits begin at ``first`` in ``plan``."""
        plan = self.plan[..., first : first + digits]
        return Frame(self.into, self.back, self.grid[:, tier], plan)

    @staticmethod
    def of(frames: Sequence[Frame]) -> Basis:
        """The basis of frames that share their transform."""
        grid = torch.stack([frame.grid for frame in frames], 1)
        plan = torch.cat([frame.plan for frame in frames], -1)
        return Basis(frames[0].into, frames[0].back, grid, plan)


def stored(basis: Basis) -> Basis:
    """A copy of a basis in the dtypes of a layer's own frames."""
    into, back, grid, plan = basis
    return Basis(into.to(STORED), back.to(STORED), grid.clone(), plan.clone())


def pack_digits(digits: Tensor) -> Tensor:
    """[..., N] digits in 0..3 -> [..., N / 4] bytes (N / 8 little-endian int16 words)."""
    n = digits.shape[-1]
    if n % DIGITS_PER_WORD:
        raise ValueError(f"{n} digits do not fill words of {DIGITS_PER_WORD}")
    quads = digits.reshape(*digits.shape[:-1], n // 4, 4).to(torch.uint8)
    return quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6


def unpack_digits(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_digits`: [..., N / 4] bytes -> [..., N] uint8."""
    shifts = torch.arange(0, 8, DIGIT_BITS, dtype=torch.uint8, device=packed.device)
    digits = (packed.unsqueeze(-1) >> shifts) & 3
    return digits.flatten(-2)


@cache
def _centred_quads(device: torch.device) -> Tensor:
    """[256, 4] float32: the four digits of a byte, less 1.5."""
    return unpack_digits(torch.arange(256, dtype=torch.uint8, device=device)[:, None]).float() - 1.5


def centred_digits(packed: Tensor) -> Tensor:
    """[..., N / 4] bytes -> [..., N] float32, each digit less 1.5."""
    return F.embedding(packed.int(), _centred_quads(packed.device)).flatten(-2)


def _encode_log(x: Tensor, steps_per_octave: int, one: int) -> Tensor:
    """[...] numbers >= 0 -> uint8: 0 is nothing, code c > 0 stands for 2 ** ((c - one) / steps)."""
    code = torch.round(torch.log2(x) * steps_per_octave) + one
    return torch.where(x > 0, code.clamp(0, 255), torch.zeros_like(code)).to(torch.uint8)


def _decode_log(code: Tensor, steps_per_octave: int, one: int) -> Tensor:
    """Inverse of :func:`_encode_log`: float32."""
    x = torch.exp2((code.float() - one) / steps_per_octave)
    return torch.where(code > 0, x, torch.zeros_like(x))


def encode_radius(r: Tensor) -> Tensor:
    """[...] radii >= 0 -> uint8 codes, relative error at most 2**(1/32) - 1.

    What is too small for code 1 is nothing; what is above :func:`largest_radius` is clamped.
    """
    return _encode_log(r, RADIUS_STEPS_PER_OCTAVE, RADIUS_ZERO)


def decode_radius(code: Tensor) -> Tensor:
    """uint8 codes -> float32 radii."""
    return _decode_log(code, RADIUS_STEPS_PER_OCTAVE, RADIUS_ZERO)


def largest_radius() -> float:
    """The largest radius that the 8-bit code can hold."""
    return 2.0 ** ((255 - RADIUS_ZERO) / RADIUS_STEPS_PER_OCTAVE)


def best_gain(
    z: Tensor, weight: Tensor, quantise: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Quantise z [..., D] at each of ``GAINS``; codes and unit vectors of the best fit.

    ``quantise`` takes vectors of unit mean square. The fit is the share of z's weighted
    energy that the best multiple of the coded vector explains.
    """
    r = z.square().mean(-1, keepdim=True).sqrt()
    unit = z / torch.where(r > 0, r, torch.ones_like(r))
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for gain in GAINS:
        code, zh = quantise(unit / gain)
        along = (weight * unit * zh).sum(-1, keepdim=True)
        fit = along * along.abs() / (weight * zh * zh).sum(-1, keepdim=True).clamp(min=1e-30)
        if best is None:
            best = code, zh, fit
        else:
            better = fit > best[2]
            pairs = zip((code, zh, fit), best, strict=True)
            best = tuple(torch.where(better, new, old) for new, old in pairs)
    assert best is not None
    return best[0], best[1]


def radius_of(z: Tensor, zh: Tensor, weight: Tensor, unbiased: bool) -> Tensor:
    """Radii [...] with which unit vectors zh [..., D] stand for z [..., D]."""
    along, energy = (weight * z * zh).sum(-1), (weight * z * z).sum(-1)
    radius = along / (weight * zh * zh).sum(-1)
    if unbiased:
        radius = torch.minimum(energy / along, UNBIASED_CAP * radius)
    # A code that points away from its vector, which no grid here gives, would keep the length.
    length = z.square().mean(-1).sqrt()
    radius = torch.where((along > 0) & torch.isfinite(radius), radius, length)
    return torch.where(length > 0, radius, torch.zeros_like(radius))


def encode(x: Tensor, frame: Frame, *, unbiased: bool) -> tuple[Tensor, Tensor]:
    """Code vectors in a frame.

    Args:
        x: [B, H, n, D], any float dtype.
        frame: the head's frame.
        unbiased: fit the radius so that ``<z, z^> = <z, z>`` (keys: no shrinking of
            logits), up to ``UNBIASED_CAP`` times the least-squares radius, so that one badly
            coded token cannot shout; otherwise least squares (values).

    Returns:
        digits [B, H, n, N] uint8, and radii [B, H, n] float32 before their own coding.
    """
    z = torch.matmul(x.float() - frame.centre, frame.into.float())
    step, levels, weight = (row.unsqueeze(-2) for row in frame.grid.unbind(1))

    def quantise(unit: Tensor) -> tuple[Tensor, Tensor]:
        code = torch.floor(unit / step + levels / 2)
        code = torch.minimum(code.clamp(min=0), levels - 1)
        return code, step * (code - (levels - 1) / 2)

    code, zh = best_gain(z, weight, quantise)
    radius = radius_of(z, zh, weight, unbiased)
    dims, shifts = frame.plan.long().unbind(1)
    batch, _, n, _ = x.shape
    index = dims[None, :, None, :].expand(batch, -1, n, -1)
    digits = (code.to(torch.int32).gather(-1, index) >> shifts[:, None, :].int()) & 3
    return digits.to(torch.uint8), radius


def decode(digits: Tensor, radius: Tensor, frame: Frame) -> Tensor:
    """[B, H, n, N] digits and [B, H, n] radii -> [B, H, n, D] float32 vectors."""
    out = frame.out
    return torch.matmul(digits.float() - 1.5, out[:, :-1]) * radius.unsqueeze(-1) + out[:, -1:]


def encode_score(score: Tensor) -> Tensor:
    """[...] scores >= 0 -> uint8 codes; what is too small for code 1 is nothing."""
    return _encode_log(score, SCORE_STEPS_PER_OCTAVE, SCORE_ONE)


def decode_score(code: Tensor) -> Tensor:
    """uint8 codes -> float32 scores."""
    return _decode_log(code, SCORE_STEPS_PER_OCTAVE, SCORE_ONE)
