"""Published ways to quantise a KV cache, simulated on exact keys and values.

Each takes vectors [B, H, n, D] and gives what a decoder would read; the bits say what storing
them costs, every scale counted. Nothing here is packed or fast: it exists to be compared with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from skv_compile.lowering import codes
from skv_compile.lowering.hadamard import rotation
from skv_compile.lowering.layout import Digits, Layout
from skv_compile.lowering.reference.calibrate import fit_frames
from skv_compile.lowering.turn import block_start, turn

RADIUS_BITS = 8
GROUP_BITS = 32  # a scale and a zero point in float16

Quantise = Callable[[Tensor], Tensor]


def coded_region(tokens: int, sinks: int, recent: int, page: int = 1) -> slice:
    """Tokens that are quantised after a prompt of ``tokens``: whole pages between the windows."""
    room = max(0, tokens - sinks - recent)
    return slice(sinks, sinks + room // page * page)


def replace_region(x: Tensor, region: slice, quantise: Quantise) -> Tensor:
    """A copy of x [B, H, T, D] with the tokens of ``region`` quantised."""
    out = x.clone()
    if region.stop > region.start:
        out[:, :, region] = quantise(x[:, :, region]).to(x.dtype)
    return out


# ---------------------------------------------------------------- Hadamard and Lloyd-Max


@cache
def lloyd_levels(dim: int, bits: int) -> Tensor:
    """[2**bits] levels of least squared error for a coordinate of a random direction.

    The direction is uniform on the sphere of radius sqrt(dim): density (1 - x**2 / dim) **
    ((dim - 3) / 2), close to a unit normal. Lloyd's iteration in float64.
    """
    x = torch.linspace(-1, 1, 400_001, dtype=torch.float64)
    density = (1 - x * x).clamp(min=0) ** ((dim - 3) / 2)
    density = density / density.sum()
    zero = density.new_zeros(1)
    mass = torch.cat([zero, density.cumsum(0)])
    moment = torch.cat([zero, (density * x).cumsum(0)])
    quantiles = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    levels = x[torch.searchsorted(mass[1:].contiguous(), quantiles)]
    for _ in range(10_000):
        borders = torch.cat([zero - 2, (levels[1:] + levels[:-1]) / 2, zero + 2])
        at = torch.searchsorted(x, borders)
        new = (moment[at[1:]] - moment[at[:-1]]) / (mass[at[1:]] - mass[at[:-1]])
        moved, levels = float((new - levels).abs().max()), new
        if moved < 1e-10:
            break
    return (levels - levels.flip(0)) / 2 * dim**0.5


def lloyd_max(x: Tensor, bits: int, *, unbiased: bool) -> Tensor:
    """Rotate by a random Hadamard matrix, quantise every coordinate, keep an 8-bit log radius.

    ``unbiased``: the radius keeps ``<x, x^> = <x, x>`` (keys); otherwise least squares (values).
    """
    dim = x.shape[-1]
    turned = rotation(dim).to(x.device)
    levels = lloyd_levels(dim, bits).to(x.device)
    z = x.double() @ turned
    norm = z.norm(dim=-1, keepdim=True)
    unit = z / torch.where(norm > 0, norm, torch.ones_like(norm)) * dim**0.5
    zh = levels[torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2)]
    along = (z * zh).sum(-1, keepdim=True)
    radius = norm.square() / along if unbiased else along / zh.square().sum(-1, keepdim=True)
    radius = torch.where(norm > 0, radius, torch.zeros_like(radius))
    stored = codes.decode_radius(codes.encode_radius(radius))
    return ((stored.double() * zh) @ turned.T).to(x.dtype)


def lloyd_bits(dim: int, bits: int) -> float:
    """Bits per coordinate, the radius counted."""
    return bits + RADIUS_BITS / dim


# ---------------------------------------------------------------- KIVI


def kivi_keys(x: Tensor, bits: int, group: int) -> Tensor:
    """Every channel by itself, ``group`` tokens together."""
    return kivi_values(x.mT, bits, group).mT


def kivi_values(x: Tensor, bits: int, group: int) -> Tensor:
    """Every token by itself, ``group`` channels together.

    Asymmetric and uniform from the group's minimum to its maximum; scale and minimum are
    rounded to float16. A last group may be shorter.
    """
    n = x.shape[-1]
    short = -n % group
    full = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], short)], -1)
    parts = full.unflatten(-1, (-1, group)).double()
    low = parts.amin(-1, keepdim=True).half().double()
    scale = ((parts.amax(-1, keepdim=True) - low) / (2**bits - 1)).half().double()
    code = ((parts - low) / torch.where(scale > 0, scale, torch.ones_like(scale))).round()
    code = code.clamp(0, 2**bits - 1)
    return (code * scale + low).flatten(-2)[..., :n].to(x.dtype)


def kivi_bits(tokens: int, dim: int, bits: int, group: int) -> float:
    """Bits per coordinate, the mean of keys and values, scales and zero points counted."""
    return bits + GROUP_BITS * (-(-tokens // group) / tokens + -(-dim // group) / dim) / 2


# ---------------------------------------------------------------- our keys alone


def frame_keys(
    q: Tensor, k: Tensor, v: Tensor, plan: Tensor, layout: Layout, digits: int
) -> Tensor:
    """Keys [B, H, T, D] of a prompt as the frame codec would give them back at ``digits`` digits.

    The cache has no tier with exact values; this runs its calibration, encoder and decoder on
    the keys alone. ``layout`` and ``plan`` [2, D] are those of a frame cache. q [B, Hq, T, D].
    """
    tiers = (Digits(digits, layout.tiers[0].value),)
    layout = dataclasses.replace(layout, tiers=tiers, unit=0)
    tokens = k.shape[2]
    position = torch.arange(tokens, device=k.device)
    basis, *_ = fit_frames(q, k, v, None, position, plan, layout)
    frame = basis.frame(0, 0, digits)
    region = coded_region(tokens, layout.sinks, layout.recent, layout.page_tokens)
    by = block_start(position[region] - layout.sinks, layout)

    def quantise(x: Tensor) -> Tensor:
        x = turn(x.float(), -by, plan) if layout.block else x.float()
        code, radius = codes.encode(x, frame, unbiased=True)
        x = codes.decode(code, codes.decode_radius(codes.encode_radius(radius)), frame)
        return turn(x, by, plan) if layout.block else x

    return replace_region(k, region, quantise)


def frame_digits(dim: int, bits: float) -> int:
    """2-bit digits a key at a total rate of ``bits``, the radius counted."""
    digits = round((bits * dim - RADIUS_BITS) / 2)
    if abs(2 * digits + RADIUS_BITS - bits * dim) > 1e-6:
        raise ValueError(f"{bits} bits a coordinate are not a whole number of digits at dim {dim}")
    return digits
