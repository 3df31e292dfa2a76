"""The list of work of the GPU kernels, kept beside a pool."""

from __future__ import annotations

import torch
from torch import Tensor

from ..lowering import kernels
from ..lowering.generate import Spec, tile_sizes
from ..lowering.layout import EXACT_DTYPES, Layout
from ..lowering.work import Work


def has_kernels(layout: Layout, group: int, device: torch.device) -> bool:
    """Whether forwards of one token run on kernels."""
    return (
        device.type == "cuda"
        and layout.kind == "digits"
        and EXACT_DTYPES[layout.dtype] != torch.float64
        and group <= kernels.MOST_ROWS
        and kernels.triton_found()
    )


def _sizes(
    layers: int, batch: int, heads: int, group: int, layout: Layout, device: torch.device
) -> tuple[int, int, int, int]:
    """Visits beside those of pages, visits of a page, segments, and (group, tier) pairs."""
    spec = Spec(layout.key, group, 1)
    bins = batch * heads * len(layout.tiers)
    segments = kernels.programs_of(spec, device) + bins
    if not layout.tracked:
        return 0, 0, segments, bins
    tiles = zip(layout.capacity, tile_sizes(layout), strict=True)
    blocks = -(-layout.max_coded // layout.block) if layout.block else 0
    # Pages of a (group, tier) do not overlap: beyond one visit for every tile of a page, they are
    # as many as there are blocks.
    fixed = layers * bins * (blocks // min(spec.slots) + 1)
    return fixed, max(-(-slots // tile) for slots, tile in tiles), segments, bins


def _aligned(n: int) -> int:
    """int32 numbers of a layer, such that those of the next begin at 16 bytes: CUDA graphs copy an
    input that does not."""
    return -(-n // 4) * 4


class Schedule:
    """Buffers of a ``Work`` for all layers of a pool, at addresses that never change.

    They are filled between steps, from the pages as they then are; forwards of one token read
    them. Empty where no kernel will (another device, codec or dtype).

    Args:
        layers, batch, heads: of the pool; ``group``: query heads of a kv head.
        layout: of every layer. ``pages``: of the pool.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        group: int,
        layout: Layout,
        pages: int,
        device: torch.device,
    ) -> None:
        self.layout, self.group = layout, group
        self.used = has_kernels(layout, group, device)
        self.stale = self.used
        visits = segments = bins = 0
        if self.used:
            fixed, of_page, segments, bins = _sizes(layers, batch, heads, group, layout, device)
            visits = max(1, fixed + of_page * pages)
        shapes = (visits, 4), (layers, segments, 4), (layers, _aligned(bins + self.used))
        self.work = Work(*(torch.zeros(s, dtype=torch.int32, device=device) for s in shapes))

    @staticmethod
    def cost(
        layers: int, batch: int, heads: int, group: int, layout: Layout, device: torch.device
    ) -> tuple[int, int]:
        """Bytes of the buffers: without any page, and for every page of the pool."""
        if not has_kernels(layout, group, device):
            return 0, 0
        fixed, of_page, segments, bins = _sizes(layers, batch, heads, group, layout, device)
        return 16 * max(1, fixed) + layers * (16 * segments + 4 * _aligned(bins + 1)), 16 * of_page

    @property
    def bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(x.nbytes for x in self.work)

    def changed(self) -> None:
        """Say that other tokens are in pages than when the work was listed."""
        self.stale = self.used

    def of(self, layer: int) -> Work:
        """The buffers of one layer."""
        return Work(self.work.visits, self.work.segments[layer], self.work.first[layer])

    def refresh(self, table: Tensor, pool: Tensor, info: Tensor, coded: Tensor) -> None:
        """Fill the buffers, if pages have changed; arguments as in ``work.work_of``."""
        if not self.stale:
            return
        found = kernels.plan_work(table, pool, info, coded, self.layout, self.group)
        assert found.visits.shape[0] <= self.work.visits.shape[0]
        self.work.visits[: found.visits.shape[0]].copy_(found.visits)
        layers = len(table)
        self.work.segments[:layers].copy_(found.segments)
        self.work.first[:layers, : found.first.shape[1]].copy_(found.first)
        self.stale = False
