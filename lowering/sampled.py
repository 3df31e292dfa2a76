"""Attention of a prompt's sampled queries to all of its tokens, as sums, by Triton kernels.

Nothing as large as the attention weights is written. They come from products of fp16 or bf16
numbers where a model has those, summed in float32: they only say which tokens matter.

Import only where Triton is installed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .generate import power_of_two
from .kernels import rows_of
from .layout import Layout

LOG2E = math.log2(math.e)


@triton.jit
def finite(x):
    """Numbers as float32, 0 in place of NaN and Inf."""
    x = x.to(tl.float32)
    return tl.where((x == x) & (tl.abs(x) < float("inf")), x, 0.0)


@triton.jit
def _queries(q, number, row, group, H, length, N, R, d, D: tl.constexpr):
    """Rows of the sampled queries of a (row, kv head) and the tokens they are of, -1 for none."""
    own = tl.load(number + group // H * N + row % N, mask=row < R, other=-1)
    own = tl.where(own < length, own, -1)
    at = q + (group * R + row)[:, None] * D + d[None, :]
    return tl.load(at, mask=(row < R)[:, None] & (d < D)[None, :], other=0.0), own


@triton.jit(do_not_specialize=["tokens", "N", "R"])
def _outputs(
    q, k, v, lead, number, out, top,
    tokens, k_b, k_h, k_t, v_b, v_h, v_t, scale, H, N, R,
    D: tl.constexpr, DP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Attention outputs of sampled queries, and log2 of the sums of their softmax."""
    group = tl.program_id(1).to(tl.int64)
    b, h = group // H, group % H
    begin = tl.load(lead + b)
    length = tokens - begin
    row, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DP)
    query, own = _queries(q, number, row, group, H, length, N, R, d, D)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)
    for first in range(0, tl.max(own, 0) + 1, KEYS):
        t = first + tl.arange(0, KEYS)
        real = (t < length)[:, None] & (d < D)[None, :]
        at = (t + begin)[:, None]
        keys = finite(tl.load(k + b * k_b + h * k_h + at * k_t + d[None, :], mask=real, other=0.0))
        s = tl.dot(query, tl.trans(keys.to(query.dtype)), input_precision=PRECISE) * scale
        s = tl.where(t[None, :] <= own[:, None], s, float("-inf"))
        above = tl.maximum(largest, tl.max(s, 1))
        base = tl.where(above > float("-inf"), above, 0.0)
        shrink = tl.exp2(largest - base)
        p = tl.exp2(s - base[:, None])
        values = finite(
            tl.load(v + b * v_b + h * v_h + at * v_t + d[None, :], mask=real, other=0.0)
        )
        p, values = p.to(query.dtype), values.to(query.dtype)
        total = total * shrink + tl.sum(p.to(tl.float32), 1)
        acc = tl.dot(p, values, acc * shrink[:, None], input_precision=PRECISE)
        largest = above
    total = tl.where(total > 0, total, 1.0)  # nothing to see
    acc = acc / total[:, None]
    at = group * R + row
    tl.store(top + at, largest + tl.log2(total), mask=row < R)
    real = (row < R)[:, None] & (d < D)[None, :]
    tl.store(out + at[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["tokens", "N", "R", "cells", "batch"])
def _weights(
    q, k, v, lead, number, out, top, weight, square, mass,
    tokens, k_b, k_h, k_t, v_b, v_h, v_t, scale, H, N, R, batch, cells,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
    SINKS: tl.constexpr, RECENT: tl.constexpr, BLOCK: tl.constexpr, CELL: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    """Of the tokens of a cell, which is a block or a part of one: sums over the queries of w and
    of a^2; and of every query, the sum of w over the cell."""
    cell, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = group // H, group % H
    begin = tl.load(lead + b)
    length = tokens - begin
    parts: tl.constexpr = (BLOCK + CELL - 1) // CELL
    inside = cell % parts * CELL + tl.arange(0, CELL)
    start = SINKS + cell // parts * BLOCK
    t, d = start + inside, tl.arange(0, DP)
    there = (inside < BLOCK) & (t < length)
    real = there[:, None] & (d < D)[None, :]
    at = (t + begin)[:, None]
    keys = finite(tl.load(k + b * k_b + h * k_h + at * k_t + d[None, :], mask=real, other=0.0))
    values = finite(tl.load(v + b * v_b + h * v_h + at * v_t + d[None, :], mask=real, other=0.0))
    own_energy = tl.sum(values * values, 1)
    keys, values = keys.to(q.dtype.element_ty), values.to(q.dtype.element_ty)
    token_w = tl.zeros([CELL], tl.float32)
    token_square = tl.zeros([CELL], tl.float32)
    for first in range(0, R, ROWS):
        row = first + tl.arange(0, ROWS)
        query, own = _queries(q, number, row, group, H, length, N, R, d, D)
        if tl.max(own, 0) >= start + cell % parts * CELL + RECENT:
            s = tl.dot(query, tl.trans(keys), input_precision=PRECISE) * scale
            line = group * R + row
            norm = tl.load(top + line, mask=row < R, other=0.0)
            counts = there[None, :] & (t[None, :] <= own[:, None] - RECENT)
            a = tl.where(counts, tl.exp2(s - norm[:, None]), 0.0)
            o = tl.load(
                out + line[:, None] * D + d[None, :],
                mask=(row < R)[:, None] & (d < D)[None, :],
                other=0.0,
            )
            energy = tl.sum(o.to(tl.float32) * o.to(tl.float32), 1)
            distance = energy[:, None] + own_energy[None, :]
            distance -= 2 * tl.dot(o, tl.trans(values), input_precision=PRECISE)
            a = a * a
            w = a * tl.maximum(distance, 0.0)
            token_w += tl.sum(w, 0)
            token_square += tl.sum(a, 0)
            tl.store(mass + line * cells + cell, tl.sum(w, 1), mask=row < R)
    at = (h * batch + b) * tokens + t
    inside_prompt = (inside < BLOCK) & (t < tokens)
    tl.store(weight + at, token_w, mask=inside_prompt)
    tl.store(square + at, token_square, mask=inside_prompt)


@triton.jit(do_not_specialize=["tokens", "N", "R"])
def _scores(
    q, k, lead, number, top, total, square, most,
    tokens, k_b, k_h, k_t, scale, H, N, R,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, SINKS: tl.constexpr,
    RECENT: tl.constexpr, CELL: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Of the tokens of a cell, over the queries that count: sums of a and of a^2, the largest a."""
    group = tl.program_id(1).to(tl.int64)
    b, h = group // H, group % H
    begin = tl.load(lead + b)
    length = tokens - begin
    start = SINKS + tl.program_id(0) * CELL
    t, d = start + tl.arange(0, CELL), tl.arange(0, DP)
    real = (t < length)[:, None] & (d < D)[None, :]
    at = (t + begin)[:, None]
    keys = finite(tl.load(k + b * k_b + h * k_h + at * k_t + d[None, :], mask=real, other=0.0))
    keys = keys.to(q.dtype.element_ty)
    sums = tl.zeros([CELL], tl.float32)
    squares = tl.zeros([CELL], tl.float32)
    largest = tl.zeros([CELL], tl.float32)
    for first in range(0, R, ROWS):
        row = first + tl.arange(0, ROWS)
        query, own = _queries(q, number, row, group, H, length, N, R, d, D)
        if tl.max(own, 0) >= start + RECENT:
            s = tl.dot(query, tl.trans(keys), input_precision=PRECISE) * scale
            norm = tl.load(top + group * R + row, mask=row < R, other=0.0)
            counts = (t < length)[None, :] & (t[None, :] <= own[:, None] - RECENT)
            a = tl.where(counts, tl.exp2(s - norm[:, None]), 0.0)
            sums += tl.sum(a, 0)
            squares += tl.sum(a * a, 0)
            largest = tl.maximum(largest, tl.max(a, 0))
    at = group * tokens + t
    tl.store(total + at, sums, mask=t < tokens)
    tl.store(square + at, squares, mask=t < tokens)
    tl.store(most + at, largest, mask=t < tokens)


class Sampled:
    """Sampled queries of a prompt and what they attend to.

    Args:
        q: [B, H, G, n, D]; k, v: [B, H, T, D].
        lead: [B] padding before the first token of every row; token t stands at ``lead + t``.
        number: [B, n], which token each query is of; below 0 is none.
        scale: of the logits.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lead: Tensor,
        number: Tensor,
        scale: float,
        layout: Layout,
    ) -> None:
        self.q, self.lead, self.layout = q.contiguous(), lead, layout
        self.k, self.v = rows_of(k), rows_of(v)
        self.number = number.int().contiguous()
        self.batch, self.heads, self.tokens, dim = k.shape
        self.rows = q.shape[2] * q.shape[3]
        self.scale = scale * LOG2E
        wide = power_of_two(dim, 16)
        size = wide * q.element_size()
        self.cell = min(128, 32768 // size)
        self.shape: dict[str, Any] = {
            "D": dim,
            "DP": wide,
            "ROWS": min(64, max(16, 16384 // size)),
            "PRECISE": "tf32x3" if q.dtype == torch.float32 else "tf32",
        }
        self.out = torch.empty_like(self.q)
        self.top = self._new(self.batch * self.heads * self.rows)
        self._attend()

    def _new(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=self.q.device)

    def _numbers(self, *strides: int) -> tuple[Any, ...]:
        return (self.tokens, *strides, self.scale, self.heads, self.q.shape[3], self.rows)

    def _attend(self) -> None:
        numbers = self._numbers(*self.k.stride()[:3], *self.v.stride()[:3])
        at_once = self.shape["ROWS"]
        _outputs[(-(-self.rows // at_once), self.batch * self.heads)](
            self.q, self.k, self.v, self.lead, self.number, self.out, self.top, *numbers,
            **self.shape, KEYS=at_once, num_warps=4,
        )  # fmt: skip

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """With w = a^2 |v - o|^2, over pairs beyond the recent window: sums of w and of a^2 for
        every token [H, B * T], and of w for every query and block [B, H, G * n, blocks]."""
        layout = self.layout
        block = layout.block or self.cell
        cell = min(self.cell, power_of_two(block, 16))
        parts = -(-block // cell)
        cells = max(1, -(-(self.tokens - layout.sinks) // block)) * parts
        weight, square = (self._new(self.heads, self.batch * self.tokens) for _ in range(2))
        mass = self._new(self.batch, self.heads, self.rows, cells)
        numbers = self._numbers(*self.k.stride()[:3], *self.v.stride()[:3])
        _weights[(cells, self.batch * self.heads)](
            self.q, self.k, self.v, self.lead, self.number, self.out, self.top,
            weight, square, mass, *numbers, self.batch, cells, **self.shape,
            SINKS=layout.sinks, RECENT=layout.recent, BLOCK=block, CELL=cell, num_warps=8,
        )  # fmt: skip
        mass = mass.unflatten(-1, (-1, parts)).sum(-1) if parts > 1 else mass
        return weight, square, mass if layout.block else mass.sum(-1, keepdim=True)

    def scores(self) -> tuple[Tensor, Tensor, Tensor]:
        """Over the same pairs, sums of a and of a^2 and the largest a: [B, H, T] each."""
        layout, shape = self.layout, (self.batch, self.heads, self.tokens)
        found = self._new(*shape), self._new(*shape), self._new(*shape)
        cells = max(1, -(-(self.tokens - layout.sinks) // self.cell))
        _scores[(cells, self.batch * self.heads)](
            self.q, self.k, self.lead, self.number, self.top, *found,
            *self._numbers(*self.k.stride()[:3]), **self.shape,
            SINKS=layout.sinks, RECENT=layout.recent, CELL=self.cell, num_warps=8,
        )  # fmt: skip
        return found
