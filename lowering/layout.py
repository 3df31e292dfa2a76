"""The bytes of a page, written once.

A page holds ``P`` consecutive tokens of one (layer, batch row, kv head) in one
tier. Its fields follow one another; offsets and sizes are sympy expressions of
the symbols below, so that Python, the kernel templates and the tests all read
the same layout. Everything an op must know about a page and about the exact
region beside it travels in a short string, ``Layout.key``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

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

EXACT_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def symbolic_fields(kind: str) -> dict[str, tuple[sympy.Expr, sympy.Expr]]:
    """``{field: (offset, size)}`` in bytes, as expressions of ``D P NK NV ITEM``."""
    sizes = EXACT_FIELDS if kind == "exact" else CODED_FIELDS
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


@dataclass(frozen=True)
class Layout:
    """Shape of a layer's state.

    ``kind`` is ``"digits"`` (radius and 2-bit digits), ``"rings"`` (the same with a cell of
    every two coordinates in two to four digits; keys and values alike) or ``"exact"`` (the
    identity codec). ``max_tokens``: slots of the dense cache it stands for. ``sinks`` first and
    ``recent`` last tokens stay exact, in elements of ``dtype``. Pages of the same ``block``
    tokens share one rotary turn; 0 means that keys are coded as they come. A sequence that
    begins with at least ``calibrate`` tokens at once gets frames of its own; 0 means never.
    """

    kind: str
    head_dim: int
    max_tokens: int
    page_tokens: int
    sinks: int
    recent: int
    key_digits: int = 0
    value_digits: int = 0
    block: int = 0
    calibrate: int = 0
    dtype: str = "float32"

    @cached_property
    def key(self) -> str:
        return ":".join(str(getattr(self, name)) for name in self.__dataclass_fields__)

    @staticmethod
    @cache
    def parse(key: str) -> Layout:
        """The layout whose ``key`` this is."""
        kind, *numbers, dtype = key.split(":")
        names = list(Layout.__dataclass_fields__)[1:-1]
        fields = dict(zip(names, map(int, numbers), strict=True))
        return Layout(kind, **fields, dtype=dtype)

    @cached_property
    def fields(self) -> dict[str, Field]:
        """Byte offsets and sizes inside a page."""
        values = {
            D: self.head_dim,
            P: self.page_tokens,
            NK: self.key_digits,
            NV: self.value_digits,
            ITEM: EXACT_DTYPES[self.dtype].itemsize,
        }
        return {
            name: Field(int(offset.subs(values)), int(sympy.sympify(size).subs(values)))
            for name, (offset, size) in symbolic_fields(self.kind).items()
        }

    @cached_property
    def page_bytes(self) -> int:
        last = list(self.fields.values())[-1]
        return last.offset + last.size

    @property
    def cell_digits(self) -> int:
        """Digits of one ring code, which covers two coordinates."""
        return 2 * self.key_digits // self.head_dim

    @property
    def ring(self) -> int:
        """Slots of the recent window: a page of tokens waits there to fill up."""
        return self.recent + self.page_tokens

    @property
    def exact_slots(self) -> int:
        return self.sinks + self.ring

    @property
    def bits_per_coordinate(self) -> float:
        """Every bit of a page over the key and value coordinates it holds."""
        return self.page_bytes * 8 / (2 * self.page_tokens * self.head_dim)

    @property
    def max_pages(self) -> int:
        """Pages that ``max_tokens`` tokens of one row and head can fill."""
        return max(0, self.max_tokens - self.sinks - self.recent) // self.page_tokens
