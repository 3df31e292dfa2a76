"""Coded tokens of many heads in flat lists: what policies judge and the pool stores."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..lowering.layout import GAP_FILLER, Layout
from ..lowering.reference.pages import Records


@dataclass
class Tokens:
    """J tokens, each of one head.

    ``group`` [J] int64: (layer * batch + row) * heads + head. ``i`` [J] int64: place in the row,
    counted from the first token after the sinks. ``level`` [J] int64: 0 is dropped, n is tier
    n - 1; of a token that is not coded yet, the number of tiers. ``score`` [J]: what the policy
    knows of it. ``key_radius``, ``value_radius`` [J]: of its code, or of the vector in the frame.
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
        return Tokens(*(getattr(self, f.name)[index] for f in fields(self)))

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


def ranks(key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of sorted keys [J] int64: place of each among its equals, the distinct keys, their counts."""
    distinct, counts = torch.unique_consecutive(key, return_counts=True)
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(key), device=key.device) - starts.repeat_interleave(counts)
    return place, distinct, counts


def in_order(tokens: Tokens) -> Tensor:
    """The order by group, then by place."""
    order = tokens.i.argsort(stable=True)
    return order[tokens.group[order].argsort(stable=True)]


def pages_for(tokens: Tokens, layout: Layout) -> int:
    """Pages that tokens at their levels take, with the slots that long gaps need."""
    kept = tokens[tokens.level > 0]
    if len(kept) == 0:
        return 0
    order = in_order(kept)
    key = (kept.group * len(layout.tiers) + kept.level - 1)[order]
    again = key.argsort(stable=True)
    place, distinct, counts = ranks(key[again])
    gap = kept.i[order][again].diff(prepend=kept.i[:1])
    gap[place == 0] = 0
    lists = torch.arange(len(counts), device=key.device).repeat_interleave(counts)
    fillers = torch.zeros_like(counts).scatter_add_(0, lists, gap // GAP_FILLER)
    capacity = torch.tensor(layout.capacity, device=key.device)[distinct % len(layout.tiers)]
    return int(((counts + fillers + capacity - 1) // capacity).sum())
