"""``append`` and ``retain`` of one token as Triton kernels: what the references do, in one launch.

Import only where Triton is installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .generate import power_of_two
from .kernels import check_heads, mask_parts, rows_of
from .layout import Layout
from .state import FLAG_FULL, FLAG_NONFINITE, FLAG_POSITION

TILE = 4096  # elements of the new keys that are looked through at once, fewer with many rows


@triton.jit
def _not_finite(
    x, batch, x_b, x_h, stored, rows, H: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr
):
    """Whether a row that is stored has NaN or Inf among x [B, H, D]."""
    bad = tl.zeros([TILE], tl.int32)
    for start in range(0, batch * H * D, TILE):
        n = start + tl.arange(0, TILE)
        b = n // (H * D)
        here = tl.load(x + b * x_b + n // D % H * x_h + n % D, mask=b < batch, other=0.0)
        here = here.to(tl.float32)
        wrong = (here != here) | (tl.abs(here) == float("inf"))
        own = tl.sum(tl.where(rows[None, :] == b[:, None], stored[None, :], 0), 1)
        bad |= (wrong & (own != 0)).to(tl.int32)
    return tl.max(bad, 0)


@triton.jit
def _append(
    k, v, mask, position, exact_keys, exact_values, meta,
    batch, k_b, k_h, v_b, v_h, mask_b, mask_h, slots,
    H: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, BP: tl.constexpr,
    SINKS: tl.constexpr, RING: tl.constexpr, MOST: tl.constexpr, MASK: tl.constexpr,
    MASK_HEADS: tl.constexpr, HIDDEN: tl.constexpr,
    NONFINITE: tl.constexpr, POSITION: tl.constexpr, FULL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # A program a row. Each reads all rows, for what is wrong with one is stored of none; a row
    # that its own program has already counted further reads as a rewind to where it was.
    row = tl.program_id(0)
    rows = tl.arange(0, BP)
    there = rows < batch
    pad = tl.load(meta + 4 * rows, mask=there, other=0)
    length = tl.load(meta + 4 * rows + 1, mask=there, other=0)
    coded = tl.load(meta + 4 * rows + 2, mask=there, other=0)
    start = tl.load(position)
    fresh = (start == 0) & (pad + length > 0)
    pad = tl.where(fresh, 0, pad)
    length = tl.where(fresh, 0, length)
    coded = tl.where(fresh, 0, coded)
    length = tl.where(start < pad + length, start - pad, length)
    in_ring = length >= coded + tl.where(coded > 0, SINKS, 0)
    pad = tl.where(length < 0, pad + length, pad)
    length = tl.maximum(length, 0)
    bad_position = tl.max((there & ((pad + length != start) | (in_ring == 0))).to(tl.int32), 0)
    lead = tl.zeros([BP], tl.int64)
    if MASK:
        at = mask + rows.to(tl.int64) * mask_b + tl.minimum(start, slots - 1)
        seen = tl.zeros([BP], tl.int32)
        for head in range(MASK_HEADS):
            x = tl.load(at + head * mask_h, mask=there, other=0)
            if MASK == 1:
                seen |= (x != 0).to(tl.int32)
            else:
                seen |= (x.to(tl.float32) > HIDDEN).to(tl.int32)
        lead = tl.where((seen == 0) & (length == 0), 1, 0).to(tl.int64)
    new_length = length + 1 - lead
    stored = (there & (lead == 0)).to(tl.int32)
    bad_value = _not_finite(k, batch, k_b, k_h, stored, rows, H, D, TILE)
    bad_value |= _not_finite(v, batch, v_b, v_h, stored, rows, H, D, TILE)
    waits = tl.maximum(new_length - SINKS, 0) - coded
    bad_room = tl.max((there & (waits > RING)).to(tl.int32), 0) | (start + 1 > MOST).to(tl.int32)
    bad = bad_value | bad_position | bad_room

    mine = rows == row
    own_lead = tl.sum(tl.where(mine, lead, 0), 0)
    own_length = tl.sum(tl.where(mine, length, 0), 0)
    own_pad = tl.sum(tl.where(mine, pad, 0), 0)
    own_coded = tl.sum(tl.where(mine, coded, 0), 0)
    h = tl.arange(0, HP)[:, None]
    d = tl.arange(0, DP)[None, :]
    i = own_length - SINKS
    slot = tl.where(i < 0, own_length, SINKS + (i + RING) % RING)
    write = (h < H) & (d < D) & (bad == 0) & (own_lead == 0)
    at = ((row * H + h).to(tl.int64) * (SINKS + RING) + slot) * D + d
    for_row = h * k_h + d + row * k_b
    x = tl.load(k + for_row, mask=(h < H) & (d < D), other=0.0)
    tl.store(exact_keys + at, x.to(exact_keys.dtype.element_ty), mask=write)
    x = tl.load(v + h * v_h + d + row * v_b, mask=(h < H) & (d < D), other=0.0)
    tl.store(exact_values + at, x.to(exact_values.dtype.element_ty), mask=write)
    own = meta + 4 * row
    if bad == 0:
        tl.store(own, own_pad + tl.where(own_length == 0, own_lead, 0))
        tl.store(own + 1, own_length + 1 - own_lead)
        tl.store(own + 2, own_coded)
    else:
        flags = bad_value * NONFINITE | bad_position * POSITION | bad_room * FULL
        tl.store(own + 3, tl.load(own + 3) | flags.to(tl.int64))


@triton.jit
def _retain(
    q, position, queries, meta, q_b, q_h,
    H: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr,
    SINKS: tl.constexpr, OBSERVED: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    start = tl.load(position)
    i = start - tl.where(start == 0, 0, tl.load(meta + 4 * row)) - SINKS
    if (i >= 0) & (i % EVERY == EVERY - 1):
        h = tl.arange(0, HP)[:, None]
        d = tl.arange(0, DP)[None, :]
        real = (h < H) & (d < D)
        x = tl.load(q + row * q_b + h * q_h + d, mask=real, other=0.0)
        at = ((row * H + h).to(tl.int64) * OBSERVED + i // EVERY % OBSERVED) * D + d
        tl.store(queries + at, x.to(queries.dtype.element_ty), mask=real)


def append(
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    position: Tensor,
    exact_keys: Tensor,
    exact_values: Tensor,
    meta: Tensor,
    layout: Layout,
) -> None:
    """``reference.append`` of one token a row on a device that raises nothing."""
    k, v = rows_of(k), rows_of(v)
    batch, heads, _, dim = k.shape
    seen, mask_b, _, slots = mask_parts(mask)
    kind, hidden, mask_h = 0, 0.0, 0
    if mask is not None and seen is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        hidden = 0.0 if kind == 1 else torch.finfo(mask.dtype).min / 2
        mask_h = seen.stride(1) if seen.shape[1] > 1 else 0
    tile = min(TILE, 32 * TILE // power_of_two(batch))  # times rows: what registers hold
    _append[(batch,)](
        k, v, meta if seen is None else seen, position, exact_keys, exact_values, meta,
        batch, k.stride(0), k.stride(1), v.stride(0), v.stride(1), mask_b, mask_h, slots,
        H=heads, D=dim, HP=power_of_two(heads), DP=power_of_two(dim), BP=power_of_two(batch, 2),
        SINKS=layout.sinks, RING=layout.ring, MOST=layout.max_tokens, MASK=kind,
        MASK_HEADS=1 if mask is None else mask.shape[1], HIDDEN=hidden,
        NONFINITE=FLAG_NONFINITE, POSITION=FLAG_POSITION, FULL=FLAG_FULL, TILE=tile, num_warps=4,
    )  # fmt: skip


def retain(q: Tensor, position: Tensor, queries: Tensor, meta: Tensor, layout: Layout) -> None:
    """``reference.retain``."""
    batch, heads, _, dim = q.shape
    check_heads(q, queries)
    q = rows_of(q)
    _retain[(batch,)](
        q, position, queries, meta, q.stride(0), q.stride(1),
        H=heads, D=dim, HP=power_of_two(heads), DP=power_of_two(dim), SINKS=layout.sinks,
        OBSERVED=layout.observed, EVERY=layout.stride // layout.observed, num_warps=4,
    )  # fmt: skip
