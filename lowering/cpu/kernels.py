"""The CPU's implementations of the ops: what they can do, and how the library is called."""

from __future__ import annotations

import ctypes
import weakref
from functools import lru_cache

import torch
from torch import Tensor

from ..codes import Frame
from ..kernels import (
    LONG,
    MOST_ROWS,
    MOST_TOKENS,
    Expected,
    check_heads,
    mask_parts,
    rows_of,
)
from ..layout import EXACT_DTYPES, Layout
from ..state import State
from ..turn import turn_back_table
from .library import STRUCTS, load, missing

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NO_MASK, BOOL_MASK = -1, 3
Attend, Append, Retain, Quantise = (STRUCTS[n] for n in ("Attend", "Append", "Retain", "Quantise"))


def refusal(layout: Layout, q: Tensor, mask: Tensor | None, heads: int) -> str | None:
    """Why the library cannot do ``attend`` of a forward of ``heads`` kv heads, None if it can."""
    if load() is None:
        return Expected(missing())  # asked for, or said when it could not be built
    if layout.kind != "digits":
        return f"codes of kind {layout.kind!r} have no native kernel"
    if q.dtype not in DTYPES or q.dtype != EXACT_DTYPES[layout.dtype]:
        return f"queries of {q.dtype} with a cache of {layout.dtype}"
    if q.shape[2] > MOST_TOKENS or q.shape[1] // heads * q.shape[2] > MOST_ROWS:
        return LONG
    if mask is not None and mask.shape[1] > 1:
        return "a mask of its own for every head"
    if mask is not None and mask.dtype != torch.bool and mask.dtype not in DTYPES:
        return f"a mask of {mask.dtype}"
    return None


@lru_cache(maxsize=64)
def _tiers(layout: Layout) -> ctypes.Array:
    """Of every tier, what ``Tier`` in runs.h has."""
    numbers: list[int] = []
    for t, fields in enumerate(layout.fields):
        first = layout.digits_before(t)
        gap = fields["gap"].offset if layout.tracked else 0
        offsets = [fields[f"{side}_{part}"].offset
                   for part in ("digits", "radius") for side in ("key", "value")]  # fmt: skip
        numbers += [layout.capacity[t], *offsets, gap, *layout.tiers[t], *first]
    return (ctypes.c_int64 * len(numbers))(*numbers)


class _Turns:
    """Tables of rotary turns, kept while the plan that they were made of lives."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[weakref.ref, int, str, tuple[Tensor, Tensor]]] = {}

    def __call__(self, plan: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        key, version = id(plan), plan._version
        found = self._of.get(key)
        if found and found[0]() is plan and found[1:3] == (version, layout.key):
            return found[3]
        table = turn_back_table(-(-layout.max_coded // layout.block), plan, layout)
        gone = weakref.ref(plan, lambda _: self._of.pop(key, None))
        self._of[key] = (gone, version, layout.key, table)
        return table


_turns = _Turns()


def _mask_kind(mask: Tensor | None) -> tuple[int, float]:
    if mask is None:
        return NO_MASK, 0.0
    if mask.dtype == torch.bool:
        return BOOL_MASK, 0.0
    return DTYPES[mask.dtype], torch.finfo(mask.dtype).min / 2


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    position: Tensor,
    state: State,
    scale: float,
    layout: Layout,
) -> Tensor:
    """``reference.attend`` of what :func:`refusal` lets through, not causal."""
    library = load()
    assert library is not None
    batch, q_heads, tokens, dim = q.shape
    heads = k.shape[1]
    q, k, v = rows_of(q), rows_of(k), rows_of(v)
    kind, hidden = _mask_kind(mask)
    seen, mask_b, mask_t, slots = mask_parts(mask)
    out = torch.empty(q.shape, dtype=q.dtype)
    cosine = sine = partner = 0
    if layout.block:
        table, others = _turns(state.turn, layout)
        cosine, sine, partner = table[0].data_ptr(), table[1].data_ptr(), others.data_ptr()
    given = Attend.pack(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), 0 if seen is None else seen.data_ptr(),
        position.data_ptr(), state.exact_keys.data_ptr(), state.exact_values.data_ptr(),
        state.meta.data_ptr(), state.pool.data_ptr(), state.info.data_ptr(),
        state.table.data_ptr(), state.key_back.data_ptr(), state.key_grid.data_ptr(),
        state.key_plan.data_ptr(), state.value_back.data_ptr(), state.value_grid.data_ptr(),
        state.value_plan.data_ptr(), cosine, sine, partner,
        ctypes.addressof(_tiers(layout)), out.data_ptr(),
        batch, heads, q_heads // heads, tokens, dim, DTYPES[q.dtype], DTYPES[state.key_back.dtype],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        kind, mask_b, mask_t, slots,
        layout.sinks, layout.ring, state.table.shape[2], layout.page_bytes, layout.block,
        layout.tracked, len(layout.tiers), state.key_plan.shape[2], state.value_plan.shape[2],
        torch.get_num_threads(), scale, hidden,
    )  # fmt: skip
    library.skv_attend(given)
    return out


def append(
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    position: Tensor,
    exact_keys: Tensor,
    exact_values: Tensor,
    meta: Tensor,
    layout: Layout,
) -> bool:
    """``reference.append`` of one token a row; False, with nothing done, where the reference is
    needed: for what the library cannot do, and for the error that it would raise."""
    library = load()
    if library is None or k.shape[2] != 1 or k.dtype not in DTYPES or exact_keys.dtype != k.dtype:
        return False
    if mask is not None and mask.dtype != torch.bool and mask.dtype not in DTYPES:
        return False
    if v.dtype != k.dtype:
        return False
    k, v = rows_of(k), rows_of(v)
    kind, hidden = _mask_kind(mask)
    seen, mask_b, _, slots = mask_parts(mask)
    mask_h = 0 if seen is None else seen.stride(1)
    given = Append.pack(
        k.data_ptr(), v.data_ptr(), 0 if seen is None else seen.data_ptr(), position.data_ptr(),
        exact_keys.data_ptr(), exact_values.data_ptr(), meta.data_ptr(),
        k.shape[0], k.shape[1], k.shape[3], DTYPES[k.dtype], *k.stride()[:2], *v.stride()[:2],
        kind, mask_b, mask_h, 0 if mask is None else mask.shape[1], slots,
        layout.sinks, layout.ring, layout.max_tokens, hidden,
    )  # fmt: skip
    return bool(library.skv_append(given))


def retain(q: Tensor, position: Tensor, queries: Tensor, meta: Tensor, layout: Layout) -> bool:
    """``reference.retain``; False, with nothing done, where that is needed."""
    library = load()
    if library is None or q.dtype not in DTYPES or queries.dtype != q.dtype:
        return False
    check_heads(q, queries)
    q = rows_of(q)
    given = Retain.pack(
        q.data_ptr(), position.data_ptr(), queries.data_ptr(), meta.data_ptr(),
        q.shape[0], q.shape[1], q.shape[3], DTYPES[q.dtype], *q.stride()[:2],
        layout.sinks, layout.observed, layout.stride // layout.observed,
    )  # fmt: skip
    library.skv_retain(given)
    return True


def encodes(x: Tensor) -> bool:
    """Whether keys or values like these are coded by the library."""
    return x.device.type == "cpu" and x.dtype != torch.float64 and load() is not None


def encode_side(x: Tensor, frame: Frame, unbiased: bool) -> tuple[Tensor, Tensor]:
    """Vectors [B, H, n, D] -> packed digits [B, H, n, w] and radius codes [B, H, n, 1].

    Arguments as in ``codes.encode``.
    """
    library = load()
    assert library is not None
    batch, heads, n, dim = x.shape
    digits = frame.plan.shape[-1]
    z = torch.matmul(x.float() - frame.centre, frame.into.float()).contiguous()
    packed = torch.empty(batch, heads, n, digits // 4, dtype=torch.uint8)
    radius = torch.empty(batch, heads, n, 1, dtype=torch.uint8)
    grid, plan = frame.grid, frame.plan
    assert grid.stride()[1:] == (dim, 1)
    assert plan.stride(2) == 1
    given = Quantise.pack(
        z.data_ptr(), grid.data_ptr(), plan.data_ptr(), packed.data_ptr(), radius.data_ptr(),
        batch, heads, n, dim, digits, grid.stride(0), plan.stride(0), plan.stride(1),
        unbiased, torch.get_num_threads(),
    )  # fmt: skip
    library.skv_quantise(given)
    return packed, radius
