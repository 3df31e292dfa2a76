"""What ``reference.statistics`` knows of a prompt, by Triton kernels: every key and value is read
a few times as it is, and none is copied.

Second moments, of which the smallest eigenvalues count too, are products of float32 numbers.

Import only where Triton is installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .generate import power_of_two
from .kernels import rows_of
from .reference.fit import Side, sampled
from .reference.statistics import Attention, Prompt, chosen_blocks, weigh
from .sampled import Sampled, finite
from .turn import turn, turn_back_table

ROWS = 32  # vectors that a second moment takes at once
RUN = 1024  # of one program
COLUMNS = 64  # of a second moment that one program makes
MOMENTS = 1 << 26  # numbers of second moments that wait to be added: 256 MB


@triton.jit
def turned_rows(
    x, rows, there, d, block, table, partner, blocks, D: tl.constexpr, TURN: tl.constexpr
):
    """Coordinates d of the vectors at offsets rows [n], turned back by their blocks: float32, 0
    where there is none."""
    real = there[:, None] & (d < D)[None, :]
    y = finite(tl.load(x + rows[:, None] + d[None, :], mask=real, other=0.0))
    if TURN:
        to = tl.load(partner + d, mask=d < D, other=0)
        other = finite(tl.load(x + rows[:, None] + to[None, :], mask=real, other=0.0))
        at = table + block[:, None] * D + d[None, :]
        y = y * tl.load(at, mask=real, other=0.0)
        y += other * tl.load(at + blocks * D, mask=real, other=0.0)
    return y


@triton.jit(do_not_specialize=["tokens", "batch", "blocks", "runs"])
def _extent(
    x, lead, weight, table, partner, largest, sums,
    tokens, x_b, x_h, x_t, H, batch, blocks, runs,
    D: tl.constexpr, DP: tl.constexpr, SINKS: tl.constexpr, BLOCK: tl.constexpr,
    TURN: tl.constexpr, WEIGHED: tl.constexpr, ROWS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Of a run of tokens: the largest number, and the sum of the vectors over that."""
    run, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = group // H, group % H
    begin = tl.load(lead + b)
    d = tl.arange(0, DP)
    most = tl.zeros([DP], tl.float32)
    for part in range(2):  # the largest, then the sum in that unit
        unit = tl.max(most, 0)
        unit = tl.where(unit > 0, unit, 1.0)
        total = tl.zeros([DP], tl.float32)
        for first in range(run * RUN, tl.minimum(run * RUN + RUN, tokens), ROWS):
            t = first + tl.arange(0, ROWS)
            there = (t >= SINKS) & (t < tokens - begin)
            at = b * x_b + h * x_h + (t + begin) * x_t
            block = (t - SINKS) // BLOCK
            y = turned_rows(x, at, there, d, block, table, partner, blocks, D, TURN)
            if part == 0:
                most = tl.maximum(most, tl.max(tl.abs(y), 0))
            else:
                y = y / unit
                if WEIGHED:
                    w = tl.load(weight + (h * batch + b) * tokens + t, mask=there, other=0.0)
                    y = y * w[:, None]
                total += tl.sum(y, 0)
        if part == 1:
            at = (h * batch + b) * runs + run
            tl.store(largest + at, tl.max(most, 0))
            tl.store(sums + at * D + d, total, mask=d < D)


@triton.jit(do_not_specialize=["tokens", "w_b", "w_h", "w_t", "batch", "blocks", "before"])
def _moment(
    x, lead, weight, centre, size, table, partner, numbers, out,
    tokens, x_b, x_h, x_t, w_b, w_h, w_t, H, batch, blocks, before,
    D: tl.constexpr, DP: tl.constexpr, SINKS: tl.constexpr, BLOCK: tl.constexpr,
    TURN: tl.constexpr, QUERIES: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Columns of the sum of w y y' over a run of vectors y = x / size - centre. Of queries, as they
    are, over all of them with the weights that a block gives them."""
    run, group = tl.program_id(0) + before, tl.program_id(1).to(tl.int64)
    b, h = group // H, group % H
    begin = tl.load(lead + b)
    d = tl.arange(0, DP)
    c = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros([DP, COLUMNS], tl.float32)
    first, end = run * RUN, tl.minimum(run * RUN + RUN, tokens)
    own = weight + b * w_b + h * w_h
    least = SINKS
    if QUERIES:
        first, end, least = run * 0, tokens, SINKS * 0
        own += tl.load(numbers + run)
    else:
        unit = tl.load(size + h)
        middle = tl.load(centre + h * D + d, mask=d < D, other=0.0)
        middle_c = tl.load(centre + h * D + c, mask=c < D, other=0.0)
    for start in range(first, end, ROWS):
        t = start + tl.arange(0, ROWS)
        there = (t >= least) & (t < tokens - begin)
        at = b * x_b + h * x_h + (t + begin) * x_t
        block = (t - SINKS) // BLOCK
        if QUERIES:
            block = t * 0 + tl.load(numbers + run)
        y = turned_rows(x, at, there, d, block, table, partner, blocks, D, TURN)
        y_c = turned_rows(x, at, there, c, block, table, partner, blocks, D, TURN)
        if not QUERIES:
            y = y / unit - middle[None, :]
            y_c = y_c / unit - middle_c[None, :]
        y = y * tl.load(own + t * w_t, mask=there, other=0.0)[:, None]
        acc = tl.dot(tl.trans(y), y_c, acc, input_precision="tf32x3")
    at = out + (((run - before) * batch + b) * H + h) * D * D + d[:, None] * D + c[None, :]
    tl.store(at, acc, mask=(d < D)[:, None] & (c < D)[None, :])


# ------------------------------------------------------------ what launches them


def attention(prompt: Prompt) -> Attention:
    """``reference.statistics.attention``."""
    q, number = prompt.q, prompt.numbers.expand(len(prompt.q), -1)
    scale = q.shape[-1] ** -0.5
    found = Sampled(q, prompt.k, prompt.v, prompt.lead, number, scale, prompt.layout)
    weight, square, mass = found.weights()
    return Attention(weight, square, _query_moment(found.q.flatten(2, 3), mass, prompt))


def _query_moment(q: Tensor, mass: Tensor, prompt: Prompt) -> Tensor:
    """``reference.statistics.query_moment`` of q [B, H, R, D] and mass [B, H, R, blocks]."""
    chosen = chosen_blocks(mass.shape[-1], q.device)
    lead = torch.zeros_like(prompt.lead)
    return _second_moment(q, mass, lead, prompt, len(chosen), numbers=chosen)


def _second_moment(
    x: Tensor,
    weight: Tensor,
    lead: Tensor,
    prompt: Prompt,
    runs: int,
    unit: tuple[Tensor, Tensor] | None = None,
    numbers: Tensor | None = None,
    turned: bool = True,
) -> Tensor:
    """Sums [H, D, D] of w x x' over vectors [B, H, n, D] with weights [B, H, n, ...].

    ``unit``: size and centre of every head. ``numbers``: instead, the blocks that all vectors are
    turned by, and whose weights they have, one after the other.
    """
    batch, heads, n, dim = x.shape
    layout, back = prompt.layout, _turn(prompt, turned)
    wide = power_of_two(dim, 16)
    columns = min(wide, COLUMNS)
    most = min(runs, max(1, MOMENTS // (batch * heads * dim * dim)))
    out = x.new_empty(most, batch, heads, dim, dim, dtype=torch.float32)
    size, centre = unit or (out, out)  # not read
    total = x.new_zeros(heads, dim, dim, dtype=torch.float32)
    for before in range(0, runs, most):
        some = min(most, runs - before)
        _moment[(some, batch * heads, wide // columns)](
            x, lead, weight, centre, size, *back[:2], out if numbers is None else numbers, out,
            n, *x.stride()[:3], *weight.stride()[:3], heads, batch, back[2], before,
            D=dim, DP=wide, SINKS=layout.sinks, BLOCK=layout.block or 1,
            TURN=turned and layout.block > 0, QUERIES=numbers is not None, COLUMNS=columns,
            ROWS=ROWS, RUN=RUN, num_warps=4, num_stages=1,
        )  # fmt: skip
        total += out[:some].sum((0, 1))
    return total


def _turn(prompt: Prompt, turned: bool = True) -> tuple[Tensor, Tensor, int]:
    """What kernels need to turn keys back: table, partners and number of blocks."""
    layout = prompt.layout
    if not turned or layout.block == 0:
        return prompt.k, prompt.k, 1  # not read
    blocks = max(1, -(-(prompt.k.shape[2] - layout.sinks) // layout.block))
    return *turn_back_table(blocks, prompt.plan, layout), blocks


def sides(prompt: Prompt) -> tuple[Side, Side]:
    """``reference.statistics.sides``."""
    key_weight, value_weight, metric = weigh(attention(prompt), prompt)
    return (
        _side(prompt.k, key_weight, metric, prompt),
        _side(prompt.v, value_weight, None, prompt),
    )


def _side(x: Tensor, weight: Tensor, metric: Tensor | None, prompt: Prompt) -> Side:
    """Keys, which have a metric, or values [B, H, T, D] with weights [H, B * T]."""
    keys = metric is not None
    x = rows_of(x)
    batch, heads, tokens, dim = x.shape
    layout, runs = prompt.layout, -(-tokens // RUN)
    table, partner, blocks = _turn(prompt, keys)
    largest = weight.new_empty(heads, batch * runs)
    sums = weight.new_empty(heads, batch * runs, dim)
    _extent[(runs, batch * heads)](
        x, prompt.lead, weight, table, partner, largest, sums,
        tokens, *x.stride()[:3], heads, batch, blocks, runs,
        D=dim, DP=power_of_two(dim, 16), SINKS=layout.sinks, BLOCK=layout.block or 1,
        TURN=keys and layout.block > 0, WEIGHED=not keys, ROWS=ROWS, RUN=RUN, num_warps=4,
    )  # fmt: skip
    size = largest.amax(1)
    size = torch.where(size > 0, size, 1.0)
    total = weight.sum(1).clamp(min=1e-30)
    mass = prompt.counts.sum().clamp(min=1) if keys else total
    centre = (sums * (largest / size[:, None])[..., None]).sum(1) / mass.view(-1, 1)
    by_row = weight.unflatten(1, (batch, tokens)).transpose(0, 1)
    spread = _second_moment(x, by_row, prompt.lead, prompt, runs, unit=(size, centre), turned=keys)
    size, centre = size[:, None, None], centre[:, None]
    sample = sampled(batch * tokens, x.device)
    some = _picked(x, sample.index, prompt, keys) / size
    some = torch.where(prompt.counts[sample.index, None], some, centre)
    return Side(some, weight[:, sample.index], centre, spread / total[:, None, None], size, metric)


def _picked(x: Tensor, index: Tensor, prompt: Prompt, turned: bool) -> Tensor:
    """Vectors [H, m, D] of tokens [m], numbered over all rows."""
    tokens, layout = x.shape[2], prompt.layout
    row, t = index // tokens, index % tokens
    at = (t + prompt.lead[row]).clamp(max=tokens - 1)
    found = torch.nan_to_num(x[row, :, at].float(), posinf=0.0, neginf=0.0)
    if turned and layout.block:
        start = (t - layout.sinks).clamp(min=0) // layout.block * layout.block + layout.sinks
        found = turn(found, -start[:, None], prompt.plan)
    return found.transpose(0, 1)
