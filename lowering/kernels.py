"""``attend`` by generated Triton kernels: what they can do, and how they are launched."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .errors import CacheStateError
from .generate import Spec, module, names_of, power_of_two, tile_sizes
from .launch import Launch, chains, same_kernels
from .layout import EXACT_DTYPES, Layout
from .state import CODED, State
from .work import Work, work_of

log = logging.getLogger(__name__)

MOST_TOKENS = 16  # of a forward; longer ones turn keys instead of queries
MOST_ROWS = 64  # query rows of a kv head
SWITCH = "SKV_ATTEND"  # environment: "reference" turns the kernels off


@cache
def triton_found() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def turned_off() -> bool:
    """Whether the environment asks for the reference."""
    return os.environ.get(SWITCH) == "reference"


def refusal(
    layout: Layout, q: Tensor, mask: Tensor | None, group: int, heads: int | None = None
) -> str | None:
    """Why the kernels cannot do a forward, None if they can. Does not wait for the device.

    ``heads``: query heads that the cache was made for.
    """
    if not triton_found():
        return "Triton is not installed"
    if turned_off():
        return f"{SWITCH}=reference"
    if layout.kind != "digits":
        return f"codes of kind {layout.kind!r} have no kernels"
    if q.dtype != EXACT_DTYPES[layout.dtype] or q.dtype == torch.float64:
        return f"queries of {q.dtype} with a cache of {layout.dtype}"
    if q.shape[2] > MOST_TOKENS or group * q.shape[2] > MOST_ROWS:
        return LONG
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if heads is not None and q.shape[1] != heads:
        return f"{q.shape[1]} query heads with a cache made for {heads}"
    if mask is not None and mask.shape[1] > 1:
        return "a mask of its own for every head"
    return None


def one_token(x: Tensor) -> bool:
    """Whether a forward of keys or queries [B, H, T, D] has kernels to store what it brings."""
    return x.shape[2] == 1 and x.dtype != torch.float64 and triton_found() and not turned_off()


class Expected(str):
    """A reason for the reference that is no surprise, and not worth a warning."""


LONG = Expected("many query rows: turning keys is less work than turning so many queries")
FIRST = Expected("several tokens that begin a sequence, which read no codes")


@cache
def say(reason: str, instead: str = "on Triton kernels") -> None:
    """Say once that something runs on the slower reference, and not ``instead``."""
    if isinstance(reason, Expected):
        return
    log.warning("skv::attend runs on its PyTorch reference, not %s: %s.", instead, reason)


def check_heads(q: Tensor, queries: Tensor) -> None:
    """Refuse queries [B, Hq, ...] of other heads than those that are kept."""
    if queries.shape[1] != q.shape[1]:
        raise CacheStateError(
            f"{q.shape[1]} query heads meet a cache made for {queries.shape[1]}. Make the cache "
            "from the config of the model that uses it."
        )


def rows_of(x: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def spec_of(q: Tensor, k: Tensor, mask: Tensor | None, layout: str, raw: bool) -> Spec:
    """The spec of a forward; ``raw``: for a GPU."""
    kind, least = "none", 0.0
    if mask is not None:
        kind = "bool" if mask.dtype == torch.bool else "float"
        least = 0.0 if kind == "bool" else torch.finfo(mask.dtype).min
    chained = raw and chains(q.device)
    layout = same_kernels(layout)
    return Spec(layout, q.shape[1] // k.shape[1], q.shape[2], kind, least, raw, chained=chained)


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; of the interpreter one."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs_of(spec: Spec, device: torch.device) -> int:
    """Segments that the pages of a layer are cut into."""
    return multiprocessors(device) * Launch.of(spec, device).pages_per_sm


def plan_work(
    table: Tensor, pool: Tensor, info: Tensor, coded: Tensor, layout: Layout, group: int
) -> Work:
    """The work of some layers for forwards of one token: see :func:`work_of`."""
    spec = Spec(layout.key, group, 1)
    programs = programs_of(spec, table.device)
    return work_of(table, pool, info, coded, layout, spec.slots, tile_sizes(layout), programs)


def steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    position: Tensor,
    state: State,
    scale: float,
    layout: Layout,
    *,
    work: Work | None = None,
    raw: bool = True,
    launch: Launch | None = None,
    spec: Spec | None = None,
) -> tuple[Tensor, tuple[Callable[[], None], ...]]:
    """``attend`` by generated kernels: what will be the result, and the launches that make it.

    Arguments as in ``reference.attend``. ``work``: of this layer alone; made here where it is None,
    which waits for the device. ``raw``: False for Triton's interpreter.
    """
    spec = spec or spec_of(q, k, mask, layout.key, raw)
    launch = launch or Launch.of(spec, q.device)
    made, names = module(spec), names_of(spec)
    (batch, heads, _, dim), tokens = k.shape, q.shape[2]
    groups, rows, tiles = batch * heads, spec.rows, names["NE"]
    if work is None:
        one = (state.table[None], state.pool, state.info, state.meta[None, :, CODED], layout)
        programs = multiprocessors(q.device) * launch.pages_per_sm
        work = work_of(*one, spec.slots, tile_sizes(layout), programs)
    blocks = max(1, -(-layout.max_coded // layout.block)) if layout.block else 1
    chunks = -(-blocks // names["BB"])
    width = sum(8 * tier["qp"] for tier in names["tiers"])
    segments = work.segments.shape[-2]

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(math.prod(shape), dtype=dtype, device=q.device)

    digits = scratch(groups, blocks, rows, width, dtype=torch.float16)
    terms = scratch(names["PIECES"], groups, blocks, rows, 2)
    powers = scratch(groups)
    flags = scratch(groups, blocks if mask is not None else 1, dtype=torch.int8)
    exact_part, exact_stat = scratch(groups, tiles, rows, dim), scratch(groups, tiles, rows, 2)
    part, stat = scratch(segments, rows, names["NV"]), scratch(segments, rows, 2)
    out_rows = groups * spec.group * tokens
    pieces = scratch(out_rows, names["PIECES_OUT"] + 1, dim)
    ready = scratch(out_rows, dtype=torch.int32)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q, k, v = rows_of(q), rows_of(k), rows_of(v)
    seen, mask_b, mask_t, slots = mask_parts(mask)
    seen = flags if seen is None else seen
    chained = {"launch_pdl": True} if spec.chained else {}
    registers = {"maxnreg": launch.pages_registers} if launch.pages_registers else {}

    def prepare() -> None:
        made.prepare[(groups * (tiles + chunks * names["PIECES"]),)](
            q, k, v, seen, position, state.meta, state.exact_keys, state.exact_values, state.turn,
            state.key_back, state.key_grid, state.key_plan,
            digits, terms, powers, flags, exact_part, exact_stat, ready,
            q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2),
            v.stride(0), v.stride(1), v.stride(2), mask_b, mask_t,
            slots, blocks, groups, scale, H=heads, num_warps=launch.prepare_warps, **chained,
        )  # fmt: skip

    def pages() -> None:
        made.pages[(segments,)](
            state.pool, state.pool.view(torch.int16), state.table, work.visits,
            work.segments, state.meta, position, seen,
            digits, terms, powers, flags, part, stat,
            mask_b, mask_t, slots, blocks, groups, layout.max_pages, H=heads,
            num_warps=launch.pages_warps, num_stages=launch.pages_stages, **registers, **chained,
        )  # fmt: skip

    parts = power_of_two(min(256, max(16, -(-segments // groups))))

    def merge() -> None:
        made.merge[(out_rows * (names["PIECES_OUT"] + 1),)](
            out, work.first, part, stat, exact_part, exact_stat,
            state.value_back, state.value_grid, state.value_plan, pieces, ready, H=heads,
            NS=parts, num_warps=min(4, max(1, parts // 32)), **chained,
        )  # fmt: skip

    return out, (prepare, pages, merge)


def mask_parts(mask: Tensor | None) -> tuple[Tensor | None, int, int, int]:
    """A mask [B or 1, 1, T or 1, S] as bytes or floats, its strides of row and token, and S."""
    if mask is None:
        return None, 0, 0, 1
    if mask.stride(-1) != 1:
        mask = mask.contiguous()
    stride_b = 0 if mask.shape[0] == 1 else mask.stride(0)
    stride_t = 0 if mask.shape[2] == 1 else mask.stride(2)
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    return mask, stride_b, stride_t, mask.shape[-1]


def attend(*args: Any, **kw: Any) -> Tensor:
    """``reference.attend`` by generated kernels; arguments as in :func:`steps`."""
    out, launches = steps(*args, **kw)
    for launch in launches:
        launch()
    return out
