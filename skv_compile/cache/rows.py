"""Rows of a cache selected, repeated or reordered, in all layers together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, shown
from ..retention.rows import select
from .home import make_keeper
from .layer import SphericalLayer
from .state import LayerState


def select_rows(layers: Sequence[Any], indices: Tensor) -> None:
    """Let row n of every layer be what its row ``indices[n]`` is (a bool mask also selects).

    With as many rows as before everything stays where it is; else the compressed layers get a
    new pool, made before the old one goes.

    Raises:
        CacheStateError: the last forward failed halfway; it is undone.
        ConfigError: these are no rows of the cache, or the budget does not hold so many. Nothing
            is changed.
    """
    full = [x for x in layers if isinstance(x, SphericalLayer) and x.state is not None]
    states = [layer.state for layer in full]
    if not full:
        return
    full[0].take_back()
    indices = _rows(indices, full[0].batch_size)
    made = _selected([s for s in states if s is not None], indices, len(full[0].siblings))
    for layer in layers:
        if not isinstance(layer, SphericalLayer) and layer.is_initialized:
            layer.batch_select_indices(indices)
    for layer, state in zip(full, made, strict=True):
        if state is not layer.state:
            layer.adopt(state)


def _rows(indices: Any, batch: int) -> Tensor:
    """Numbers of rows, from numbers or from a mask."""
    if isinstance(indices, Tensor) and indices.dim() == 1 and indices.numel():
        if indices.dtype == torch.bool:
            if len(indices) == batch and bool(indices.any()):
                return indices.nonzero().flatten()
        elif not indices.is_floating_point() and not indices.is_complex():
            low, high = indices.aminmax()
            if int(low) >= 0 and int(high) < batch:
                return indices.long()
    raise ConfigError(
        f"rows {shown(indices)}: expected a tensor of at least one number from 0 to {batch - 1}, "
        f"or a mask of {batch} that selects a row. To forget every row, call cache.reset()."
    )


def _selected(states: list[LayerState], indices: Tensor, layers: int) -> list[LayerState]:
    """The states of those rows. ``layers``: that share the budget, allocated or not."""
    indices = indices.to(states[0].device)
    keepers = {id(s.keeper): s.keeper for s in states}
    for keeper in keepers.values():
        keeper.settle()
    if len(indices) == states[0].batch:
        for keeper in keepers.values():
            select(keeper, keeper, indices)
        for state in states:
            state.take_rows(state, indices)
        return states
    fresh: dict[int, Any] = {}
    for key, keeper in keepers.items():
        first = next(s for s in states if s.keeper is keeper)
        layout, count = first.layout, keeper.pool.layers
        shape = (len(indices), first.heads, layout.head_dim, layout.max_tokens)
        budget = first.config.budget_bytes
        part = None if budget is None else budget * count // layers
        turned = layout.block > 0
        fresh[key] = make_keeper(
            first.config, count, *shape, first.dtype, first.device, first.group, part, turned
        )
    made = [state.with_rows(fresh[id(state.keeper)], indices) for state in states]
    for key, keeper in keepers.items():
        select(fresh[key], keeper, indices)
    return made
