"""Coded tokens of many heads in flat lists: what policies judge and the pool stores."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..lowering.layout import GAP_FILLER, Layout
from ..lowering.reference.pages import Records

PLACE_BITS = 32  # of a sort key, below those of the group


@dataclass
class Tokens:
    """J tokens, each of one head.

    ``group`` [J] int64: (layer * batch + row) * heads + head. ``i`` [J] int64: place in the row,
    counted from the first token after the sinks. ``level`` [J] int64: 0 is dropped, n is tier
    n - 1; of a token that is not coded yet, the highest that it may get. ``score`` [J]: what the
    policy knows of it. ``key_radius``, ``value_radius`` [J]: of its code, or of the vector in the
    frame.
    ``fresh`` [J] bool: not coded yet.
    """

    group: Tensor
    i: Tensor
    level: Tensor
    score: Tensor
    key_radius: Tensor
    value_radius: Tensor
    fresh: Tensor

    def __len__(self) -> int:
        return self.group.shape[0]

    def __getitem__(self, index: Tensor) -> Tokens:
        if index.dtype == torch.bool:  # looked through once, not for every field
            index = index.nonzero().squeeze(1)
        return Tokens(*(getattr(self, f.name)[index] for f in fields(self)))

    @staticmethod
    def none(device: torch.device) -> Tokens:
        """No tokens."""
        empty = torch.empty(0, device=device)
        number = empty.long()
        return Tokens(number, number, number, empty, empty, empty, empty.bool())

    @staticmethod
    def cat(parts: list[Tokens]) -> Tokens:
        names = [f.name for f in fields(Tokens)]
        return Tokens(*(torch.cat([getattr(p, name) for p in parts]) for name in names))

    def at(self, level: Tensor) -> Tokens:
        """The same tokens at other levels."""
        return replace(self, level=level)


@dataclass
class Content:
    """Tokens with their codes: ``records[t]`` are the fields [n, w] of ``tokens[t]``."""

    tokens: list[Tokens]
    records: list[Records]

    @staticmethod
    def none(tiers: int, device: torch.device) -> Content:
        """No tokens."""
        return Content([Tokens.none(device)] * tiers, [{} for _ in range(tiers)])


class Runs(NamedTuple):
    """Equals among sorted keys [J]: of each key its place in its run and the run's number; of
    each run where it starts and how many there are."""

    place: Tensor
    number: Tensor
    start: Tensor
    count: Tensor


def runs(key: Tensor) -> Runs:
    """The runs of sorted keys [J] int64. Waits for the device once."""
    begins = torch.ones_like(key, dtype=torch.bool)
    begins[1:] = key[1:] != key[:-1]
    start = begins.nonzero().squeeze(1)
    number = begins.cumsum(0) - 1
    place = torch.arange(len(key), device=key.device) - start[number]
    return Runs(place, number, start, start.diff(append=start.new_full((1,), len(key))))


def in_order(tokens: Tokens) -> Tensor:
    """The order by group, then by place."""
    return (tokens.group << PLACE_BITS | tokens.i).argsort()


def pages_for(tokens: Tokens, layout: Layout) -> int:
    """Pages that tokens at their levels take, with the slots that long gaps need."""
    kept = (tokens.level > 0).nonzero().squeeze(1)
    if len(kept) == 0:
        return 0
    tiers = len(layout.tiers)
    lists = tokens.group[kept] * tiers + tokens.level[kept] - 1
    key = (lists << PLACE_BITS | tokens.i[kept]).sort().values
    lists, i = key >> PLACE_BITS, key & (1 << PLACE_BITS) - 1
    found = runs(lists)
    gap = i.diff(prepend=i[:1])
    gap[found.start] = 0
    fillers = (gap // GAP_FILLER).cumsum(0)
    fillers = fillers[found.start + found.count - 1] - fillers[found.start]
    capacity = torch.tensor(layout.capacity, device=key.device)[lists[found.start] % tiers]
    return int(((found.count + fillers + capacity - 1) // capacity).sum())
