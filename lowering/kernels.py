"""Triton kernels of ``attend``, generated from templates for one layout and shape of rows."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jinja2
import torch
from torch import Tensor

from .codes import RADIUS_STEPS_PER_OCTAVE, RADIUS_ZERO
from .layout import DIGITS_PER_WORD, EXACT_DTYPES, GAP_FILLER, Layout
from .state import CODED, PER_TIER, State
from .work import Work, work_of

TEMPLATES = Path(__file__).parent / "templates"

#: Where the digits of a word are shifted to (left is positive), so that each lies in bits 4 to 9
#: of its half of a register. There it is the mantissa of a number near 64, 16 or 4 whose unit is 1.
RAW_SHIFT = (6, 6, 0, 0, 0, -6, -6, -6)
CENTRE = 1.5  # of a digit


class Raw(NamedTuple):
    """How a register with two words becomes two fp16 numbers, ``offset`` and a digit each."""

    move: str
    mask: str
    one: str
    offset: float
    minus: str  # of the offset and the centre of a digit

    @staticmethod
    def of(digit: int) -> Raw:
        shift = RAW_SHIFT[digit]
        bit = 2 * digit + shift
        assert 4 <= bit <= 8
        move = f"shl.b32 a, $1, {shift};" if shift > 0 else f"shr.b32 a, $1, {-shift};"
        exponent = 15 + 10 - bit  # of 2 ** (10 - bit)
        mask, one = 3 << bit, exponent << 10
        both = 0x10001
        move = move if shift else "mov.b32 a, $1;"
        offset = 2.0 ** (10 - bit)
        (minus,) = struct.unpack("<H", struct.pack("<e", -offset - CENTRE))
        return Raw(move, hex(mask * both), hex(one * both), offset, hex(minus * both))


TILE_EXACT = 32  # slots of the exact region that one program attends to

MASK_KINDS = {"none": 0, "bool": 1, "float": 2}


@dataclass(frozen=True)
class Spec:
    """Everything that generated source depends on.

    ``layout``: its key. ``group``: query heads of a kv head; ``tokens``: of a forward.
    ``least``: columns of a tile at least.
    ``mask``: none, bool or float; ``mask_min``: what hides in a float mask. ``raw``: unpack with
    inline assembly (sm_80 and later); else with shifts and conversions, which also run in Triton's
    interpreter.
    """

    layout: str
    group: int
    tokens: int
    mask: str = "none"
    mask_min: float = 0.0
    raw: bool = False
    least: int = 8  # columns of a tile
    rows_prepare: int = 64
    chained: bool = False  # launched before the kernel before it has ended

    @property
    def rows(self) -> int:
        """Query rows of a kv head, rounded up to a power of two."""
        return _power(self.group * self.tokens)

    @property
    def columns(self) -> int:
        """Columns of a tile: the query rows, of several blocks where a page may have tokens of
        several."""
        return max(self.least, self.rows)

    @property
    def slots(self) -> int:
        """Blocks that a tile has columns for."""
        return self.columns // self.rows


def _power(n: int, least: int = 1) -> int:
    return max(least, 1 << (n - 1).bit_length())


def tile_tokens(layout: Layout, tier: int) -> int:
    """Slots of a page that are read at once."""
    digits = layout.tiers[tier]
    most = 64 if max(digits) <= 32 * DIGITS_PER_WORD else 32
    return min(most, _power(layout.capacity[tier], 16))


def tile_sizes(layout: Layout) -> list[int]:
    """:func:`tile_tokens` of every tier."""
    return [tile_tokens(layout, tier) for tier in range(len(layout.tiers))]


def _tiers(layout: Layout) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    queries = 0
    for index, digits in enumerate(layout.tiers):
        kw, vw = digits.key // DIGITS_PER_WORD, digits.value // DIGITS_PER_WORD
        kp, vp = _power(kw, 16), _power(vw, 16)
        capacity, tok = layout.capacity[index], tile_tokens(layout, index)
        first = layout.digits_before(index)
        found.append(
            {
                **{name: field.offset for name, field in layout.fields[index].items()},
                "kw": kw,
                "vw": vw,
                "kp": kp,
                "vp": vp,
                "cap": capacity,
                "tok": tok,
                "parts": -(-capacity // tok),
                "ragged": capacity % tok > 0,
                "key_first": first.key,
                "value_first": first.value,
                "query_first": queries,
            }
        )
        queries += 8 * kp
    return found


def _names(spec: Spec) -> dict[str, Any]:
    """What the templates are filled with."""
    layout = Layout.parse(spec.layout)
    tiers = _tiers(layout)
    rows = spec.rows
    exact = EXACT_DTYPES[layout.dtype]
    digits = layout.digits_before(len(layout.tiers))
    tiles = -(-(layout.sinks + layout.ring + spec.tokens) // TILE_EXACT)
    raw = [Raw.of(digit) for digit in range(DIGITS_PER_WORD)]
    return {
        "about": ", ".join(f"{k}={v}" for k, v in asdict(spec).items()),
        "D": layout.head_dim,
        "DP": _power(layout.head_dim, 16),
        "G": spec.group,
        "T": spec.tokens,
        "R": spec.group * spec.tokens,
        "RP": rows,
        "RN": spec.columns,
        "RE": max(16, rows),
        "NE": tiles,
        "NEP": _power(tiles),
        "SLOTS": spec.slots,
        "BB": max(1, spec.rows_prepare // rows) if layout.block else 1,
        "NV": max(8 * tier["vp"] for tier in tiers),
        "NC": min(128, *(8 * tier["vp"] for tier in tiers)),
        "TE": TILE_EXACT,
        "wait": "tl.extra.cuda.gdc_wait()" if spec.chained else "",
        "early": "tl.extra.cuda.gdc_launch_dependents()" if spec.chained else "",
        "tiers": tiers,
        "n_tiers": len(tiers),
        "key_digits": digits.key,
        "value_digits": digits.value,
        "page_bytes": layout.page_bytes,
        "block": layout.block,
        "sinks": layout.sinks,
        "ring": layout.ring,
        "tracked": layout.tracked,
        "turned": layout.tracked and layout.block > 0,
        "gap_filler": GAP_FILLER,
        "per_tier": PER_TIER,
        "radius_zero": RADIUS_ZERO,
        "radius_steps": RADIUS_STEPS_PER_OCTAVE,
        "MASK": MASK_KINDS[spec.mask],
        "FMIN": spec.mask_min,
        "LOG2E": math.log2(math.e),
        "PRECISE": "tf32x3" if exact == torch.float32 else "tf32",
        "RAW": spec.raw,
        "raw": raw,
        "centre": [CENTRE + (x.offset if spec.raw else 0.0) for x in raw],
        "max": max,
    }


@lru_cache(maxsize=64)
def source(spec: Spec) -> str:
    """The generated module of a spec, as text."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=False,
        keep_trailing_newline=False,
    )
    names = _names(spec)
    parts = {
        name: env.get_template(f"{name}.py.jinja").render(names).strip()
        for name in ("prepare", "pages", "merge")
    }
    return env.get_template("module.py.jinja").render(**names, **parts) + "\n"


def folder() -> Path:
    """Where generated modules are kept (Triton reads a kernel's source from its file)."""
    root = os.environ.get("SKV_CACHE_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "skv_compile"
    )
    return Path(root) / "kernels"


@cache
def module(spec: Spec) -> ModuleType:
    """The generated module of a spec."""
    text = source(spec)
    name = "skv_" + hashlib.sha256(text.encode()).hexdigest()[:20]
    path = folder() / f"{name}.py"
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(text)
        partial.replace(path)
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None
    made = importlib.util.module_from_spec(found)
    found.loader.exec_module(made)
    return made


def spec_of(q: Tensor, k: Tensor, mask: Tensor | None, layout: str, raw: bool) -> Spec:
    """The spec of a forward."""
    kind, least = "none", 0.0
    if mask is not None:
        kind = "bool" if mask.dtype == torch.bool else "float"
        least = 0.0 if kind == "bool" else torch.finfo(mask.dtype).min
    return Spec(layout, q.shape[1] // k.shape[1], q.shape[2], kind, least, raw)


@dataclass
class Launch:
    """How the kernels are launched."""

    pages_warps: int = 1
    pages_stages: int = 4
    prepare_warps: int = 4
    merge_warps: int = 8
    merge_segments: int = 0
    maxnreg: int | None = None


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
    programs: int = 1056,
    raw: bool = False,
    launch: Launch | None = None,
    spec: Spec | None = None,
) -> tuple[Tensor, tuple[Callable[[], None], ...]]:
    """``attend`` by generated kernels: what will be the result, and the launches that make it.

    Arguments as in ``reference.attend``. ``work``: of this layer alone; made here where it is None.
    """
    launch = launch or Launch()
    spec = spec or spec_of(q, k, mask, layout.key, raw)
    made = module(spec)
    batch, q_heads, tokens, dim = q.shape
    heads = k.shape[1]
    groups = batch * heads
    if work is None:
        coded = state.meta[None, :, CODED]
        work = work_of(
            state.table[None], state.pool, state.info, coded, layout, spec.slots,
            tile_sizes(layout), programs,
        )  # fmt: skip
    names = _names(spec)
    rows = spec.rows
    device = q.device
    blocks = (layout.max_coded - 1) // layout.block + 1 if layout.block else 1
    blocks = max(1, blocks)
    chunks = -(-blocks // names["BB"])
    n_tiers = len(layout.tiers)
    width = sum(8 * tier["kp"] for tier in names["tiers"])
    empty = torch.empty
    f32, f16 = torch.float32, torch.float16
    q_digits = empty(groups * blocks * rows * width, dtype=f16, device=device)
    terms = empty(n_tiers * groups * blocks * rows * 2, dtype=f32, device=device)
    powers = empty(groups, dtype=f32, device=device)
    flags = empty(groups * blocks if mask is not None else 1, dtype=torch.int8, device=device)
    tiles = names["NE"]
    exact_part = empty(groups * tiles * rows * dim, dtype=f32, device=device)
    exact_stat = empty(groups * tiles * rows * 2, dtype=f32, device=device)
    segments = work.segments.shape[-2]
    part = empty(segments * rows * names["NV"], dtype=f32, device=device)
    stat = empty(segments * rows * 2, dtype=f32, device=device)
    out = empty(q.shape, dtype=q.dtype, device=device)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    seen, mask_b, mask_t, slots = meta_of(mask)
    if seen is None:
        seen = flags

    chained = {"launch_pdl": True} if spec.chained else {}

    def prepare() -> None:
        made.prepare[(groups * (tiles + chunks),)](
            q, k, v, seen, position, state.meta, state.exact_keys, state.exact_values, state.turn,
            state.key_back, state.key_grid, state.key_plan,
            q_digits, terms, powers, flags, exact_part, exact_stat,
            q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2),
            v.stride(0), v.stride(1), v.stride(2), mask_b, mask_t,
            slots, blocks, groups, scale, H=heads, num_warps=launch.prepare_warps, **chained,
        )  # fmt: skip

    def pages() -> None:
        made.pages[(segments,)](
            state.pool, state.pool.view(torch.int16), state.table, work.visits,
            work.segments, state.meta, position, seen,
            q_digits, terms, powers, flags, part, stat,
            mask_b, mask_t, slots, blocks, groups, layout.max_pages, H=heads,
            num_warps=launch.pages_warps, num_stages=launch.pages_stages, maxnreg=launch.maxnreg, **chained,
        )  # fmt: skip

    def merge() -> None:
        made.merge[(groups * spec.group * tokens,)](
            out, work.first, part, stat, exact_part, exact_stat,
            state.value_back, state.value_grid, state.value_plan, H=heads,
            NS=launch.merge_segments or _power(min(128, max(16, -(-segments // groups)))),
            num_warps=launch.merge_warps, **chained,
        )  # fmt: skip

    return out, (prepare, pages, merge)


def meta_of(mask: Tensor | None) -> tuple[Tensor | None, int, int, int]:
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
