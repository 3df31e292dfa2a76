"""The bytes of a page, written once.

A page holds ``P`` tokens of one (layer, batch row, kv head) in one tier; pages of all
tiers have the same bytes, so ``P`` differs. Its fields follow one another; offsets and
sizes are sympy expressions of the symbols below, so that Python, the kernel templates
and the tests all read the same layout. Everything an op must know about a page and about the exact
region beside it travels in a short string, ``Layout.key``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import sympy
import torch

#: head dim, tokens a page, 2-bit digits of a key and of a value, bytes of an exact element
D, P, NK, NV, ITEM = sympy.symbols("D P NK NV ITEM", positive=True, integer=True)

DIGIT_BITS = 2
DIGITS_PER_WORD = 8  # digits in one little-endian int16 word, least significant first

#: field name -> bytes, in storage order
CODED_FIELDS = {
    "key_digits": P * NK / 4,
    "value_digits": P * NV / 4,
    "key_radius": P,
    "value_radius": P,
}
EXACT_FIELDS = {
    "keys": P * D * ITEM,
    "values": P * D * ITEM,
}
#: What a page adds whose tokens need not follow one another: the distance of each from the one
#: before it, and what it is worth.
TRACKED_FIELDS = {"gap": P, "score": P}

GAP_FILLER = 255  # the gap of a slot without a token; it only carries the position on
PAGE_HEADER = 12  # bytes of a page outside the pool: two int32 in ``info``, one in the free list

EXACT_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def symbolic_fields(kind: str, tracked: bool = False) -> dict[str, tuple[sympy.Expr, sympy.Expr]]:
    """``{field: (offset, size)}`` in bytes, as expressions of ``D P NK NV ITEM``."""
    sizes = EXACT_FIELDS if kind == "exact" else CODED_FIELDS
    if tracked:
        sizes = sizes | TRACKED_FIELDS
    fields, offset = {}, sympy.Integer(0)
    for name, size in sizes.items():
        fields[name] = (offset, size)
        offset = offset + size
    return fields


@dataclass(frozen=True)
class Field:
    offset: int
    size: int

    @property
    def slice(self) -> slice:
        return slice(self.offset, self.offset + self.size)


class Digits(NamedTuple):
    """2-bit digits of a key and of a value in one tier (0, 0 where vectors are exact)."""

    key: int
    value: int


@dataclass(frozen=True)
class Layout:
    """Shape of a layer's state.

    ``kind`` is ``"digits"`` (radius and 2-bit digits), ``"rings"`` (the same with a cell of
    every two coordinates in two to four digits; keys and values alike) or ``"exact"`` (the
    identity codec). ``max_tokens``: slots of the dense cache it stands for. ``sinks`` first and
    ``recent`` last tokens stay exact, in elements of ``dtype``; ``stride`` more wait there until
    they go into pages together. ``tiers``: coarse to fine. All pages have the same bytes,
    those of ``page_tokens`` tokens of the tier ``unit``. ``tracked``: pages hold chosen tokens
    and say which. Keys of the same ``block`` tokens share one rotary turn; 0 means that keys are
    coded as they come. A sequence that begins with at least ``calibrate`` tokens at once gets
    frames of its own; 0 means never. ``observed``: queries kept to judge tokens by, of every
    ``stride``.
    """

    kind: str
    head_dim: int
    max_tokens: int
    page_tokens: int
    sinks: int
    recent: int
    stride: int
    tiers: tuple[Digits, ...] = (Digits(0, 0),)
    unit: int = 0
    tracked: bool = False
    block: int = 0
    calibrate: int = 0
    observed: int = 0
    dtype: str = "float32"

    @cached_property
    def key(self) -> str:
        parts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        parts["tiers"] = ",".join(f"{k}.{v}" for k, v in self.tiers)
        parts["tracked"] = int(self.tracked)
        return ":".join(map(str, parts.values()))

    @staticmethod
    @cache
    def parse(key: str) -> Layout:
        """The layout whose ``key`` this is."""
        kind, *rest, dtype = key.split(":")
        fields: dict[str, Any] = dict(
            zip(list(Layout.__dataclass_fields__)[1:-1], rest, strict=True)
        )
        tiers = tuple(Digits(*map(int, t.split("."))) for t in fields.pop("tiers").split(","))
        numbers: dict[str, Any] = {name: int(x) for name, x in fields.items()}
        numbers["tracked"] = bool(numbers["tracked"])
        return Layout(kind, tiers=tiers, dtype=dtype, **numbers)

    # ------------------------------------------------------------ a page

    def _bytes(self, tier: int, tokens: int) -> dict[str, Field]:
        values = {
            D: self.head_dim,
            P: tokens,
            NK: self.tiers[tier].key,
            NV: self.tiers[tier].value,
            ITEM: EXACT_DTYPES[self.dtype].itemsize,
        }
        return {
            name: Field(int(offset.subs(values)), int(sympy.sympify(size).subs(values)))
            for name, (offset, size) in symbolic_fields(self.kind, self.tracked).items()
        }

    @cached_property
    def record_bytes(self) -> tuple[int, ...]:
        """Bytes of one token in each tier."""
        return tuple(
            sum(field.size for field in self._bytes(t, 1).values()) for t in range(len(self.tiers))
        )

    @cached_property
    def page_bytes(self) -> int:
        return self.page_tokens * self.record_bytes[self.unit]

    @cached_property
    def capacity(self) -> tuple[int, ...]:
        """Tokens in a page of each tier."""
        return tuple(self.page_bytes // size for size in self.record_bytes)

    @cached_property
    def fields(self) -> tuple[dict[str, Field], ...]:
        """Of each tier, byte offsets and sizes inside a page."""
        return tuple(self._bytes(t, tokens) for t, tokens in enumerate(self.capacity))

    @property
    def cell_digits(self) -> tuple[int, ...]:
        """Of each tier, digits of one ring code, which covers two coordinates."""
        return tuple(2 * tier.key // self.head_dim for tier in self.tiers)

    def digits_before(self, tier: int) -> Digits:
        """Where the digits of a tier begin in the plans of all tiers."""
        below = self.tiers[:tier]
        return Digits(sum(t.key for t in below), sum(t.value for t in below))

    # ------------------------------------------------------------ the exact region

    @property
    def ring(self) -> int:
        """Slots of the recent window and of the tokens that wait to leave it together."""
        return self.recent + self.stride

    @property
    def exact_slots(self) -> int:
        return self.sinks + self.ring

    # ------------------------------------------------------------ how much there is

    def rate(self, tier: int) -> float:
        """Bits per coordinate of full pages of a tier, every bit of them counted."""
        size = self.page_bytes + (PAGE_HEADER if self.tracked else 0)
        return size * 8 / (2 * self.capacity[tier] * self.head_dim)

    @property
    def max_coded(self) -> int:
        """Tokens of a row that can leave the exact region."""
        return max(0, self.max_tokens - self.sinks - self.recent)

    @property
    def max_pages(self) -> int:
        """Pages that the tokens of one row and head can need."""
        if not self.tracked:
            return self.max_coded // self.page_tokens
        # One page begun in every tier, as many full ones as the finest tier makes, and in every
        # tier the slots of the longest gaps.
        fillers = sum(-(-(self.max_coded // GAP_FILLER) // slots) for slots in self.capacity)
        most = len(self.tiers) + -(-self.max_coded // self.capacity[-1]) + fillers
        return -(-most // 4) * 4  # lists begin at 16 bytes: CUDA graphs copy inputs that do not
