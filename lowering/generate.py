"""Triton source of ``attend``, generated from templates for one layout and shape of rows."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import struct
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jinja2
import torch

from ..files import cache_folder, replacing
from .codes import RADIUS_STEPS_PER_OCTAVE, RADIUS_ZERO
from .layout import DIGITS_PER_WORD, EXACT_DTYPES, GAP_FILLER, Digits, Layout
from .state import PER_TIER

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
        move = "mov.b32 a, $1;"
        if shift:
            move = f"sh{'l' if shift > 0 else 'r'}.b32 a, $1, {abs(shift)};"
        exponent = 15 + 10 - bit  # of 2 ** (10 - bit)
        mask, one = 3 << bit, exponent << 10
        both = 0x10001
        offset = 2.0 ** (10 - bit)
        (minus,) = struct.unpack("<H", struct.pack("<e", -offset - CENTRE))
        return Raw(move, hex(mask * both), hex(one * both), offset, hex(minus * both))


FOLDED = 8  # words of a vector of which a row of a tile takes two
WIDE, WIDE_OUT = 128, 32  # digits that one program of `prepare` or `merge` has to do with
PAGES_AHEAD = 1  # that a program asks for before it may begin
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
        return power_of_two(self.group * self.tokens)

    @property
    def columns(self) -> int:
        """Columns of a tile: the query rows, of several blocks where a page may have tokens of
        several."""
        return max(self.least, self.rows)

    def fold(self, digits: Digits) -> int:
        """Tokens of a tier that share a row of a tile."""
        return 2 if _short(digits) and self.tokens == 1 and self.columns >= 2 * self.rows else 1

    @property
    def slots(self) -> list[int]:
        """Blocks that a tile of each tier has columns for."""
        tiers = Layout.parse(self.layout).tiers
        return [self.columns // (self.rows * self.fold(digits)) for digits in tiers]


def power_of_two(n: int, least: int = 1) -> int:
    return max(least, 1 << (n - 1).bit_length())


def _short(digits: Digits) -> bool:
    """Whether two tokens of a tier fit a row of a tile."""
    return set(digits) == {FOLDED * DIGITS_PER_WORD}


def tile_tokens(layout: Layout, tier: int) -> int:
    """Slots of a page that are read at once."""
    digits = layout.tiers[tier]
    most = 64 if max(digits) <= 32 * DIGITS_PER_WORD else 32
    least = 32 if _short(digits) else 16  # 16 rows
    return min(most, power_of_two(layout.capacity[tier], least))


def tile_sizes(layout: Layout) -> list[int]:
    """:func:`tile_tokens` of every tier."""
    return [tile_tokens(layout, tier) for tier in range(len(layout.tiers))]


def _tiers(spec: Spec) -> list[dict[str, Any]]:
    layout = Layout.parse(spec.layout)
    found: list[dict[str, Any]] = []
    queries = pieces = out = 0
    for index, digits in enumerate(layout.tiers):
        kw, vw = digits.key // DIGITS_PER_WORD, digits.value // DIGITS_PER_WORD
        fold = spec.fold(digits)
        kp, vp = power_of_two(kw * fold, 16), power_of_two(vw * fold, 16)
        qp, vs = kp // fold, vp // fold
        own = max(1, 8 * qp // WIDE)
        capacity, tok = layout.capacity[index], tile_tokens(layout, index)
        first = layout.digits_before(index)
        found.append(
            {
                **{name: field.offset for name, field in layout.fields[index].items()},
                "kw": kw,
                "vw": vw,
                "kp": kp,
                "vp": vp,
                "qp": qp,
                "vs": vs,
                "fold": fold,
                "slots": spec.slots[index],
                "cap": capacity,
                "tok": tok,
                "parts": -(-capacity // tok),
                "ragged": capacity % tok > 0,
                "key_first": first.key,
                "value_first": first.value,
                "query_first": queries,
                "wide": min(WIDE, 8 * qp),
                "pieces": own,
                "piece_first": pieces,
                "out_first": out,
            }
        )
        queries += 8 * qp
        pieces += own
        out += 8 * vs // WIDE_OUT
    return found


@cache
def names_of(spec: Spec) -> dict[str, Any]:
    """What the templates are filled with; not to be changed. Every launch looks at it."""
    layout = Layout.parse(spec.layout)
    tiers = _tiers(spec)
    rows = spec.rows
    exact = EXACT_DTYPES[layout.dtype]
    digits = layout.digits_before(len(layout.tiers))
    tiles = -(-(layout.sinks + layout.ring + spec.tokens) // TILE_EXACT)
    pieces_out = sum(8 * tier["vs"] // WIDE_OUT for tier in tiers)
    raw = [Raw.of(digit) for digit in range(DIGITS_PER_WORD)]
    return {
        "about": ", ".join(f"{k}={v}" for k, v in asdict(spec).items()),
        "D": layout.head_dim,
        "DP": power_of_two(layout.head_dim, 16),
        "G": spec.group,
        "T": spec.tokens,
        "R": spec.group * spec.tokens,
        "RP": rows,
        "RN": spec.columns,
        "RE": max(16, rows),
        "NE": tiles,
        "NEP": power_of_two(tiles),
        "any_fold": any(tier["fold"] > 1 for tier in tiers),
        "BB": max(1, spec.rows_prepare // rows) if layout.block else 1,
        "NV": max(8 * tier["vs"] for tier in tiers),
        "PIECES": sum(tier["pieces"] for tier in tiers),
        "WIDE_OUT": WIDE_OUT,
        "PIECES_OUT": pieces_out,
        "PIECES_OUT_P": power_of_two(pieces_out + 1),
        "AHEAD": PAGES_AHEAD,
        "LINES": power_of_two(max(1, layout.page_bytes // 128) + 1) // 2,
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
    names = names_of(spec)
    parts = {
        name: env.get_template(f"{name}.py.jinja").render(names).strip()
        for name in ("prepare", "pages", "merge")
    }
    return env.get_template("module.py.jinja").render(**names, **parts) + "\n"


@cache
def module(spec: Spec) -> ModuleType:
    """The generated module of a spec."""
    text = source(spec)
    name = "skv_" + hashlib.sha256(text.encode()).hexdigest()[:20]
    path = cache_folder() / "kernels" / f"{name}.py"  # Triton reads a kernel's source from a file
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            Path(temporary).write_text(text)
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    made = importlib.util.module_from_spec(found)
    found.loader.exec_module(made)
    return made
