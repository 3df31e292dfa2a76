"""``reference.pages.decode_records`` of one side by a Triton kernel.

Import only where Triton is installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import RADIUS_STEPS_PER_OCTAVE, RADIUS_ZERO, Frame
from .generate import power_of_two
from .kernels import rows_of
from .layout import Layout
from .turn import turn_back_table

ROWS = 64  # vectors of a program
PART = 32  # digits that go through the frame at once


@triton.jit
def _columns(vectors, c, d, own, DIGITS: tl.constexpr, D: tl.constexpr):
    """Coordinates ``own`` of the vectors of digits c; 0 where there is none."""
    real = (c < DIGITS)[:, None] & (d < D)[None, :]
    return tl.load(vectors + c[:, None] * D + own[None, :], mask=real, other=0.0)


# How many tokens are decoded differs every time; a kernel for each kind of number would not do.
@triton.jit(do_not_specialize=["n", "d_b", "d_h", "r_b", "r_h", "i_b", "i_h", "i_t", "H", "blocks"])
def _decode(
    digits, radius, i, vectors, table, partner, out,
    n, d_b, d_h, d_t, r_b, r_h, r_t, i_b, i_h, i_t, H, blocks,
    D: tl.constexpr, DP: tl.constexpr, DIGITS: tl.constexpr, ROWS: tl.constexpr,
    PART: tl.constexpr, BLOCK: tl.constexpr, TURN: tl.constexpr,
    STEPS: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    b, h = group // H, group % H
    t, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DP)
    there = t < n
    vectors += h * (DIGITS + 1) * D
    to = d
    if TURN:
        to = tl.load(partner + d, mask=d < D, other=0)
    x = tl.zeros([ROWS, DP], tl.float32)
    other = tl.zeros([ROWS, DP], tl.float32)
    at = digits + b * d_b + h * d_h + t.to(tl.int64) * d_t
    for first in range(0, DIGITS, PART):
        c = first + tl.arange(0, PART)
        real = there[:, None] & (c < DIGITS)[None, :]
        byte = tl.load(at[:, None] + c[None, :] // 4, mask=real, other=0).to(tl.int32)
        unit = ((byte >> 2 * (c % 4)[None, :]) & 3).to(tl.float32) - 1.5
        x = tl.dot(unit, _columns(vectors, c, d, d, DIGITS, D), x, input_precision="tf32x3")
        if TURN:  # what each coordinate is paired with, as a product of its own: no gather
            paired = _columns(vectors, c, d, to, DIGITS, D)
            other = tl.dot(unit, paired, other, input_precision="tf32x3")
    code = tl.load(radius + b * r_b + h * r_h + t.to(tl.int64) * r_t, mask=there, other=0)
    size = tl.exp2((code.to(tl.float32) - ONE) / STEPS)
    size = tl.where(code > 0, size, 0.0)[:, None]
    x = x * size + tl.load(vectors + DIGITS * D + d, mask=d < D, other=0.0)[None, :]
    real = there[:, None] & (d < D)[None, :]
    if TURN:
        other = other * size + tl.load(vectors + DIGITS * D + to, mask=d < D, other=0.0)[None, :]
        block = tl.load(i + b * i_b + h * i_h + t * i_t, mask=there, other=0) // BLOCK
        block = tl.minimum(tl.maximum(block, 0), blocks - 1)
        back = table + block[:, None] * D + d[None, :]
        x = x * tl.load(back, mask=real, other=0.0)
        x -= other * tl.load(back + blocks * D, mask=real, other=0.0)
    tl.store(out + (group * n + t)[:, None] * D + d[None, :], x, mask=real)


def decode_side(
    digits: Tensor, radius: Tensor, i: Tensor | None, frame: Frame, plan: Tensor, layout: Layout
) -> Tensor:
    """Packed digits [B, H, n, w] and radius codes [B, H, n, 1] -> vectors [B, H, n, D], float32.

    ``i`` [B or 1, H or 1, n]: coded tokens by whose blocks keys are turned, with ``plan``; None
    for values.
    """
    batch, heads, n, width = digits.shape
    dim = frame.back.shape[-1]
    out = torch.empty(batch, heads, n, dim, dtype=torch.float32, device=digits.device)
    if out.numel() == 0:
        return out
    digits = rows_of(digits)
    table = partner = where = digits  # not read
    blocks, by = 1, (0, 0, 0)
    if i is not None and layout.block:
        blocks = max(1, -(-layout.max_coded // layout.block))
        table, partner = turn_back_table(blocks, plan, layout)
        where = i.expand(batch, heads, n)
        by = where.stride()
    wide = power_of_two(dim, 16)
    _decode[(-(-n // ROWS), batch * heads)](
        digits, radius, where, frame.out, table, partner, out,
        n, *digits.stride()[:3], *radius.stride()[:3], *by, heads, blocks,
        D=dim, DP=wide, DIGITS=4 * width, ROWS=ROWS, PART=PART, BLOCK=layout.block or 1,
        TURN=where is not digits, STEPS=RADIUS_STEPS_PER_OCTAVE, ONE=RADIUS_ZERO,
        num_warps=8, num_stages=1,
    )  # fmt: skip
    return out
