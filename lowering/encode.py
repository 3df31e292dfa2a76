"""``codes.encode``, packing and radius code of many vectors by Triton kernels.

Import only where Triton is installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import GAINS, RADIUS_STEPS_PER_OCTAVE, RADIUS_ZERO, UNBIASED_CAP, Frame
from .generate import power_of_two
from .kernels import rows_of
from .layout import Layout
from .statistics import turned_rows
from .turn import turn_back_table

PART = 64  # coordinates that go through the frame at once
ELEMENTS = 2048  # of the vectors that a program of the second kernel takes


@triton.jit(do_not_specialize=["n", "i_b", "i_h", "i_t", "H", "blocks"])
def _in_frame(
    x, i, into, centre, table, partner, out,
    n, x_b, x_h, x_t, i_b, i_h, i_t, c_h, H, blocks,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    TURN: tl.constexpr, SPLIT: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    b, h = group // H, group % H
    t, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DP)
    there = t < n
    block = t * 0
    if TURN:
        block = tl.load(i + b * i_b + h * i_h + t * i_t, mask=there, other=0) // BLOCK
        block = tl.minimum(block, blocks - 1)  # of a row that has no token left
    at = b * x_b + h * x_h + t.to(tl.int64) * x_t
    z = tl.zeros([ROWS, DP], tl.float32)
    for first in range(0, DP, PART):
        c = first + tl.arange(0, PART)
        y = turned_rows(x, at, there, c, block, table, partner, blocks, D, TURN)
        y -= tl.load(centre + h * c_h + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
        real = (c < D)[:, None] & (d < D)[None, :]
        matrix = tl.load(into + h * D * D + c[:, None] * D + d[None, :], mask=real, other=0.0)
        if SPLIT:  # the matrix is bf16, and what one bf16 leaves of a vector a second takes
            high = y.to(tl.bfloat16)
            low = (y - high.to(tl.float32)).to(tl.bfloat16)
            z = tl.dot(high, matrix, tl.dot(low, matrix, z))
        else:
            z = tl.dot(y, matrix.to(tl.float32), z, input_precision="tf32x3")
    at = (group * n + t)[:, None] * D + d[None, :]
    tl.store(out + at, z, mask=there[:, None] & (d < D)[None, :])


@triton.jit
def _log_code(r, STEPS: tl.constexpr, ONE: tl.constexpr):
    """``codes.encode_radius``."""
    code = tl.floor(tl.log2(tl.where(r > 0, r, 1.0)) * STEPS + 0.5) + ONE
    return tl.where(r > 0, tl.minimum(tl.maximum(code, 0.0), 255.0), 0.0).to(tl.uint8)


@triton.jit
def _on_grid(code, step, levels):
    """What codes stand for."""
    return step[None, :] * (code - (levels[None, :] - 1) / 2)


@triton.jit
def _tried(unit, gain, step, levels, weight):
    """Codes of vectors of unit mean square on a grid that is ``gain`` times as wide, and how well
    they fit."""
    code = tl.floor(unit / gain / step[None, :] + levels[None, :] / 2)
    code = tl.minimum(tl.maximum(code, 0.0), levels[None, :] - 1)
    zh = _on_grid(code, step, levels)
    along = tl.sum(weight[None, :] * unit * zh, 1)
    energy = tl.sum(weight[None, :] * zh * zh, 1)
    return code, along * tl.abs(along) / tl.maximum(energy, 1e-30)


@triton.jit(do_not_specialize=["n", "H", "unbiased"])
def _quantise(
    z, grid, plan, digits, radius, n, g_h, p_h, p_s, H, unbiased,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
    BP: tl.constexpr, CAP: tl.constexpr, GAINS: tl.constexpr,
    STEPS: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    h, d = group % H, tl.arange(0, DP)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_d, line = d < D, group * n + t
    real = (t < n)[:, None] & in_d[None, :]
    own = tl.load(z + line[:, None] * D + d[None, :], mask=real, other=0.0)
    step = tl.load(grid + h * g_h + d, mask=in_d, other=1.0)
    levels = tl.load(grid + h * g_h + D + d, mask=in_d, other=1.0)
    weight = tl.load(grid + h * g_h + 2 * D + d, mask=in_d, other=0.0)
    length = tl.sqrt(tl.sum(own * own, 1) / D)
    unit = own / tl.where(length > 0, length, 1.0)[:, None]
    code, fit = _tried(unit, GAINS[0], step, levels, weight)
    for number in tl.static_range(1, len(GAINS)):
        other, other_fit = _tried(unit, GAINS[number], step, levels, weight)
        code = tl.where((other_fit > fit)[:, None], other, code)
        fit = tl.maximum(fit, other_fit)
    # The radius, as ``codes.radius_of``, over the vector's own.
    zh = _on_grid(code, step, levels)
    along = tl.sum(weight[None, :] * unit * zh, 1)
    r = along / tl.maximum(tl.sum(weight[None, :] * zh * zh, 1), 1e-38)
    whole = tl.sum(weight[None, :] * unit * unit, 1)
    fair = tl.minimum(whole / tl.where(along > 0, along, 1.0), CAP * r)
    r = tl.where(unbiased != 0, fair, r)
    r = length * tl.where((along > 0) & (r < float("inf")), r, 1.0)
    tl.store(radius + line, _log_code(r, STEPS, ONE), mask=t < n)
    whole_code = code.to(tl.int32)
    byte = tl.arange(0, BP)
    packed = tl.zeros([ROWS, BP], tl.int32)
    for place in tl.static_range(4):
        at = plan + h * p_h + 4 * byte + place
        dims = tl.load(at, mask=byte < BYTES, other=0).to(tl.int32)
        shift = tl.load(at + p_s, mask=byte < BYTES, other=0).to(tl.int32)
        found = tl.gather(whole_code, tl.broadcast_to(dims[None, :], [ROWS, BP]), 1)
        packed |= ((found >> shift[None, :]) & 3) << (2 * place)
    at = line[:, None] * BYTES + byte[None, :]
    tl.store(digits + at, packed.to(tl.uint8), mask=(t < n)[:, None] & (byte < BYTES)[None, :])


def in_frame(x: Tensor, i: Tensor | None, frame: Frame, plan: Tensor, layout: Layout) -> Tensor:
    """Vectors [B, H, n, D] in their frame, float32.

    ``i`` [B or 1, H or 1, n]: coded tokens by whose blocks keys are turned back first, with
    ``plan``; None for values.
    """
    batch, heads, n, dim = x.shape
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out
    x = rows_of(x)
    table = partner = where = x  # not read
    blocks, by = 1, (0, 0, 0)
    if i is not None and layout.block:
        blocks = max(1, -(-layout.max_coded // layout.block))
        table, partner = turn_back_table(blocks, plan, layout)
        where = i.expand(batch, heads, n)
        by = where.stride()
    centre, wide = frame.back[:, -1], power_of_two(dim, 16)
    # On older GPUs a tile must be as high as it is wide, or every warp makes all of it.
    raw = x.is_cuda and frame.into.dtype == torch.bfloat16  # not in the interpreter
    rows = 128 if raw and torch.cuda.get_device_capability(x.device) < (9, 0) else 64
    _in_frame[(-(-n // rows), batch * heads)](
        x, where, frame.into.contiguous(), centre, table, partner, out,
        n, *x.stride()[:3], *by, centre.stride(0), heads, blocks,
        D=dim, DP=wide, ROWS=rows, BLOCK=layout.block or 1, TURN=where is not x, SPLIT=raw,
        PART=min(PART, wide), num_warps=8, num_stages=1,
    )  # fmt: skip
    return out


def encode_side(
    x: Tensor, i: Tensor | None, frame: Frame, plan: Tensor, layout: Layout, unbiased: bool
) -> tuple[Tensor, Tensor]:
    """Vectors [B, H, n, D] -> packed digits [B, H, n, w] and radius codes [B, H, n, 1].

    Arguments as in :func:`in_frame` and ``codes.encode``.
    """
    batch, heads, n, dim = x.shape
    width = frame.plan.shape[-1] // 4
    digits = x.new_empty(batch, heads, n, width, dtype=torch.uint8)
    radius = x.new_empty(batch, heads, n, 1, dtype=torch.uint8)
    if digits.numel() == 0:
        return digits, radius
    z = in_frame(x, i, frame, plan, layout)
    grid, places, wide = frame.grid, frame.plan, power_of_two(dim, 16)
    assert grid.stride()[1:] == (dim, 1)
    assert places.stride(2) == 1
    rows = ELEMENTS // wide
    _quantise[(-(-n // rows), batch * heads)](
        z, grid, places, digits, radius,
        n, grid.stride(0), *places.stride()[:2], heads, int(unbiased),
        D=dim, DP=wide, ROWS=rows, BYTES=width, BP=power_of_two(width, 16),
        CAP=UNBIASED_CAP, GAINS=GAINS, STEPS=RADIUS_STEPS_PER_OCTAVE, ONE=RADIUS_ZERO,
        num_warps=4,
    )  # fmt: skip
    return digits, radius


def lengths(x: Tensor, i: Tensor | None, frame: Frame, plan: Tensor, layout: Layout) -> Tensor:
    """Root mean square [B, H, n] of vectors in their frame; arguments as in :func:`in_frame`."""
    z = in_frame(x, i, frame, plan, layout)
    return torch.linalg.vector_norm(z, dim=-1) * x.shape[-1] ** -0.5
