"""What each program of the kernel ``pages`` goes through: lists made between steps.

A *visit* is a page and the block that the first columns of a tile stand for; a page whose tokens
are of more blocks than a tile has columns for is visited several times. A *segment* is a run of
visits of one group and tier. Segments cost about the same, however long the rows of a batch are
and whatever tiers their pages have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import Layout
from .state import BASE, KIND, PER_TIER


class Work(NamedTuple):
    """``visits`` [n, 4] int32: page; its first slot here, and ``PER_TIER`` times how many; the i
    before it; the block of the first columns. ``segments`` [layers, programs + K, 4] int32:
    group, tier, first visit, visits. ``first`` [layers, K + 1] int32: the first segment of
    every (group, tier), K of them. Without tracked pages a visit is a tile of a page of its group.
    """

    visits: Tensor
    segments: Tensor
    first: Tensor


def visits_of(
    table: Tensor,
    pool: Tensor,
    info: Tensor,
    layout: Layout,
    slots: Sequence[int],
    tile: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Visits of tracked pages in the order of ``table`` [layers, B, H, max_pages], and how many
    there are of each layer, group and tier [layers, B * H * tiers].

    ``slots``: blocks that a tile has columns for, ``tile``: page slots it takes, of each tier.
    Waits for the device.
    """
    layers = table.shape[0]
    flat = table.flatten(1)
    device, tiers = table.device, len(layout.tiers)
    groups = flat.shape[1] // table.shape[-1]
    layer, place = (flat >= 0).nonzero(as_tuple=True)
    page = flat[layer, place].long()
    kind = info[page, KIND].long()
    tier, used = kind // PER_TIER, kind % PER_TIER
    rows, keys = [], []
    for t, capacity in enumerate(layout.capacity):
        mine = (tier == t).nonzero().squeeze(1)
        gap = pool[:, layout.fields[t]["gap"].slice][page[mine]].long()
        i = info[page[mine], BASE, None].long() + gap.cumsum(1)
        for first in range(0, capacity, tile[t]):
            count = (used[mine] - first).clamp(0, tile[t])
            there = count.nonzero().squeeze(1)
            count, where = count[there], mine[there]
            low = i[there, first]
            base = low - gap[there, first]
            high = i[there, first + count - 1]
            if layout.block == 0:
                low, high = torch.zeros_like(low), torch.zeros_like(high)
            else:
                low, high = low // layout.block, high // layout.block
            times = (high - low) // slots[t] + 1
            again = torch.arange(int(times.sum()), device=device)
            again = again - (times.cumsum(0) - times).repeat_interleave(times)
            part = [page[where], first + count * PER_TIER, base, low]
            visit = torch.stack(part, 1).repeat_interleave(times, 0)
            visit[:, 3] += again * slots[t]
            rows.append(visit)
            key = layer[where] * groups * table.shape[-1] + place[where]
            keys.append(key.repeat_interleave(times))
    key, visits = torch.cat(keys), torch.cat(rows)
    order = key.argsort(stable=True)
    visits = visits[order].int()
    bins = key[order] // table.shape[-1] * tiers
    bins += (info[visits[:, 0].long(), KIND] // PER_TIER).long()
    count = torch.zeros(layers * groups * tiers, dtype=torch.long, device=device)
    count.index_add_(0, bins, torch.ones_like(bins))
    return visits, count.view(layers, -1)


def segments_of(
    count: Tensor, start: Tensor, weight: Tensor, programs: int
) -> tuple[Tensor, Tensor]:
    """Cut visits into segments of like cost.

    Args:
        count: [layers, K] visits of every (group, tier), tiers innermost.
        start: [layers, K] where they begin.
        weight: [tiers] cost of a visit.
        programs: how many segments a layer should come to; there are at most K more.

    Returns:
        ``segments`` and ``first`` of :class:`Work`. Does not wait for the device.
    """
    layers, bins = count.shape
    tiers = len(weight)
    cost = count * weight.repeat(bins // tiers)
    unit = (cost.sum(1, keepdim=True) / programs).clamp(min=1e-9)
    parts = (cost / unit + 1e-3).floor().long().clamp(min=1)
    parts = torch.minimum(parts, count)
    ends = parts.cumsum(1)
    at = torch.arange(programs + bins, device=count.device).expand(layers, -1).contiguous()
    k = torch.searchsorted(ends, at, right=True).clamp(max=bins - 1)
    own, n = parts.gather(1, k).clamp(min=1), count.gather(1, k)
    local = at - (ends - parts).gather(1, k)
    low = local * n // own
    length = torch.where(at < ends[:, -1:], (local + 1) * n // own - low, 0)
    rows = [k // tiers, k % tiers, start.gather(1, k) + low, length]
    first = torch.nn.functional.pad(ends, (1, 0))
    return torch.stack(rows, -1).int(), first.int()


def visit_weight(layout: Layout, tile: Sequence[int], device: torch.device) -> Tensor:
    """[tiers] cost of a visit: the digits of a tile."""
    sizes = [c * (d.key + d.value + 64) for c, d in zip(tile, layout.tiers, strict=True)]
    return torch.tensor(sizes, dtype=torch.float64, device=device)


def work_of(
    table: Tensor,
    pool: Tensor,
    info: Tensor,
    coded: Tensor,
    layout: Layout,
    slots: Sequence[int],
    tile: Sequence[int],
    programs: int,
) -> Work:
    """The work of some layers.

    Args:
        table: [layers, B, H, max_pages]; pool, info: as in ``State``.
        coded: [layers, B] tokens in pages of each row.
        slots: blocks that a tile has columns for, of each tier (tracked pages).
        tile: page slots that a tile takes, of each tier.
        programs: segments wanted of each layer.
    """
    layers, batch, heads, _ = table.shape
    if layout.tracked:
        visits, count = visits_of(table, pool, info, layout, slots, tile)
        start = (count.flatten().cumsum(0) - count.flatten()).view_as(count)
    else:
        visits = torch.zeros(1, 4, dtype=torch.int32, device=table.device)
        pages = coded.to(table.device) // layout.page_tokens * -(-layout.page_tokens // tile[0])
        count = pages[:, :, None].expand(layers, batch, heads).reshape(layers, -1)
        start = torch.zeros_like(count)
    weight = visit_weight(layout, tile, table.device)
    return Work(visits, *segments_of(count, start, weight, programs))
