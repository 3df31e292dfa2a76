"""What a cache has kept, as arrays and as a picture: for people who wonder where the bits went."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..codec.tiers import tier_name
from ..errors import CacheStateError, SkvError
from ..lowering.layout import PAGE_HEADER, Layout
from ..lowering.state import CODED, PAD
from .tokens import Tokens

if TYPE_CHECKING:
    from ..cache.spherical import SphericalCache
    from ..cache.state import LayerState
    from .keeper import Keeper

BINS = 128  # of positions, in a picture


class DrawingError(SkvError):
    """A picture cannot be made here, or not there."""


def levels_of(keeper: Keeper) -> torch.Tensor:
    """[groups, max_coded] uint8: 0 for what is dropped or not coded yet, n for tier n - 1.

    A group is one (layer, row, kv head), in this order.
    """
    keeper.settle()
    pool, layout = keeper.pool, keeper.layout
    groups = pool.layers * pool.batch * pool.heads
    levels = torch.zeros(groups, layout.max_coded, dtype=torch.uint8, device=pool.device)
    if layout.tracked:
        content = pool.read(range(pool.layers), codes=False)
        tokens = Tokens.cat(content.tokens)
        levels[tokens.group, tokens.i] = tokens.level.to(torch.uint8)
        return levels
    for layer, state in enumerate(keeper.states):
        coded = state.meta[:, CODED, None, None]
        own = torch.arange(layout.max_coded, device=pool.device) < coded
        size = pool.batch * pool.heads
        mine = levels[layer * size : (layer + 1) * size]
        mine.copy_(own.expand(-1, pool.heads, -1).reshape(size, -1))
    return levels


def layers_of(cache: SphericalCache, row: int = 0) -> Iterator[tuple[int, LayerState, np.ndarray]]:
    """Of every compressed layer that has been allocated: its number in the model, its state, and
    the levels [kv heads, coded tokens] uint8 of one row, as :func:`levels_of` has them."""
    tables = {id(keeper): levels_of(keeper) for keeper in cache.keepers}
    for number, layer in enumerate(cache.layers):
        state = getattr(layer, "state", None)
        if state is None:
            continue
        pool, coded = state.keeper.pool, int(state.tensors.meta[row, CODED])
        group = (state.index * pool.batch + row) * pool.heads
        table = tables[id(state.keeper)][group : group + pool.heads, :coded]
        yield number, state, table.cpu().numpy()


def retention_map(cache: SphericalCache, row: int = 0) -> dict[str, Any]:
    """What is kept of one row of a cache, in plain arrays.

    Returns a dict:
        layers, heads: [R] of every (compressed layer, kv head), in the order of the layers.
        levels: [R, tokens] uint8 of every token that has left the exact window: 0 is dropped,
            n is stored in ``tiers[n - 1]``.
        tiers, rates: names, and bits per coordinate with full pages, coarse to fine.
        bits: [R] bits per coordinate really stored, everything counted.
        first: the place in the sequence of the first of these tokens.

    Raises:
        CacheStateError: no token has left the exact window.
    """
    found: dict[str, list[Any]] = {"layers": [], "heads": [], "levels": [], "bits": []}
    first: Layout | None = None
    begin = 0
    for number, state, table in layers_of(cache, row):
        if first is None:
            first = state.layout
            begin = int(state.tensors.meta[row, PAD]) + first.sinks
        found["levels"] += list(table)
        found["bits"] += bits_of(state, row)
        found["layers"] += [number] * len(table)
        found["heads"] += range(len(table))
    tokens = {len(x) for x in found["levels"]} or {0}
    if first is None or max(tokens) == 0:
        raise CacheStateError(
            "nothing is compressed yet: sinks and recent window hold every token that the cache "
            "has seen. Run a longer text."
        )
    levels = np.zeros((len(found["levels"]), max(tokens)), dtype=np.uint8)
    for n, mine in enumerate(found.pop("levels")):
        levels[n, : len(mine)] = mine
    return {
        **{name: np.array(x) for name, x in found.items()},
        "levels": levels,
        **tiers_of(first),
        "first": begin,
    }


def tiers_of(layout: Layout) -> dict[str, list[Any]]:
    """``tiers`` and ``rates``: names, and bits per coordinate with full pages, coarse to fine."""
    every = range(len(layout.tiers))
    return {
        "tiers": [tier_name(layout, n) for n in every],
        "rates": [layout.rate(n) for n in every],
    }


def bits_of(state: LayerState, row: int = 0) -> list[float]:
    """Bits per coordinate of a layer's heads in a row, counted as ``bits_per_coordinate`` does."""
    layout, pool = state.layout, state.keeper.pool
    if not layout.tracked:
        return [layout.rate(0)] * pool.heads
    coordinates = max(1, 2 * layout.head_dim * int(state.tensors.meta[row, CODED]))
    pages = (pool.table[state.index, row] >= 0).sum(-1).tolist()
    lists = 4 * layout.max_pages / max(1, 2 * layout.head_dim * layout.max_coded)
    size = layout.page_bytes + PAGE_HEADER
    return [8 * (n * size / coordinates + lists) for n in pages]


def binned(found: dict[str, Any], bins: int = BINS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By position: mean bits [R, n], and the share of every level [levels, n], in n <= ``bins``
    bins; and the edges [n + 1] of the bins."""
    levels = found["levels"]
    tokens = levels.shape[1]
    edges = np.unique(np.linspace(0, tokens, min(bins, tokens) + 1).round().astype(int))
    rates = np.array([0.0, *found["rates"]])
    width = np.diff(edges)
    bits = np.add.reduceat(rates[levels], edges[:-1], axis=1) / width
    shares = np.stack(
        [
            np.add.reduceat((levels == level).mean(0), edges[:-1]) / width
            for level in range(len(rates))
        ]
    )
    return bits, shares, edges + found["first"]


def compact(found: dict[str, Any], bins: int = 32) -> dict[str, Any]:
    """The map in few numbers, for JSON."""
    _, shares, edges = binned(found, bins)
    names = ["dropped", *found["tiers"]]
    whole = [(found["levels"] == level).mean() for level in range(len(names))]
    by_layer: dict[int, list[float]] = {}
    for layer, bits in zip(found["layers"].tolist(), found["bits"].tolist(), strict=True):
        by_layer.setdefault(layer, []).append(round(bits, 4))
    return {
        "tokens": found["levels"].shape[1],
        "rates": dict(zip(found["tiers"], found["rates"], strict=True)),
        "bits": {str(layer): bits for layer, bits in by_layer.items()},
        "shares": {name: round(float(x), 6) for name, x in zip(names, whole, strict=True)},
        "positions": edges.tolist(),
        "shares_by_position": {
            name: [round(float(x), 4) for x in row] for name, row in zip(names, shares, strict=True)
        },
    }


# ---------------------------------------------------------------- the picture


def check_drawing(file: str) -> None:
    """Refuse a picture that cannot be made, before the work starts.

    Raises:
        DrawingError: no matplotlib, an unknown format, or a place that cannot be written to.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise DrawingError(
            "drawing a retention map needs matplotlib; run: pip install 'skv-compile[bench]'"
        ) from error
    path = Path(file)
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise DrawingError(f"{file}: not a picture that can be drawn; end it in .png, .svg or .pdf")
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise DrawingError(f"{file}: a folder, or in none that can be written")


def draw(found: dict[str, Any], file: str, title: str = "") -> None:
    """Draw a :func:`retention_map` to a file.

    Raises:
        DrawingError: as :func:`check_drawing`.
    """
    check_drawing(file)
    from matplotlib.figure import Figure

    bits, shares, edges = binned(found)
    layers, heads = sorted(set(found["layers"].tolist())), int(found["heads"].max()) + 1
    top = max(found["rates"])
    figure = Figure(figsize=(11.5, 6.4), dpi=150, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1 + heads / 8, 6), height_ratios=(3, 1))

    # Layers by heads.
    table = np.full((len(layers), heads), np.nan)
    for layer, head, value in zip(found["layers"], found["heads"], found["bits"], strict=True):
        table[layers.index(layer), head] = value
    left = figure.add_subplot(grid[:, 0])
    look: dict[str, Any] = {"aspect": "auto", "cmap": "viridis", "vmin": 0, "vmax": top}
    left.imshow(table, interpolation="nearest", **look)
    left.set_xlabel("kv head")
    left.set_ylabel("layer")
    left.set_xticks(range(heads))
    every = -(-len(layers) // 16)
    left.set_yticks(range(0, len(layers), every), [str(n) for n in layers[::every]])
    left.set_title("bits of a head", fontsize=9)

    # Every head's tokens, in bins; grey where nothing is left.
    right = figure.add_subplot(grid[0, 1])
    extent = (float(edges[0]), float(edges[-1]), len(bits) - 0.5, -0.5)
    shown = np.ma.masked_equal(bits, 0.0)
    right.set_facecolor("#D9D9D9")
    image = right.imshow(shown, extent=extent, interpolation="none", **look)
    starts = [n for n in range(len(bits)) if n == 0 or found["layers"][n] != found["layers"][n - 1]]
    right.set_yticks(starts[::every], [str(found["layers"][n]) for n in starts[::every]])
    right.set_ylabel("layer, a row for each kv head")
    right.set_title("bits of the tokens at a position (grey: all dropped)", fontsize=9)
    figure.colorbar(image, ax=right, fraction=0.03, pad=0.01, label="bits per coordinate")

    # What became of the tokens there.
    below = figure.add_subplot(grid[1, 1])
    colours = ["#D9D9D9", *_colours(found["rates"], top)]
    names = ["dropped", *found["tiers"]]
    steps = np.concatenate([shares, shares[:, -1:]], 1)
    below.stackplot(edges, steps, labels=names, colors=colours, step="post")
    below.set_xlim(edges[0], edges[-1])
    below.set_ylim(0, 1)
    below.set_xlabel("position in the sequence")
    below.set_ylabel("share of heads")
    where: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.32)}
    below.legend(ncols=len(names), fontsize=8, frameon=False, **where)
    if title:
        figure.suptitle(title, fontsize=10)
    try:
        figure.savefig(file)
    except OSError as error:
        raise DrawingError(f"cannot write {file}: {error.strerror or error}") from error


def _colours(rates: list[float], top: float) -> list[Any]:
    """The colours that tiers have in the map above."""
    import matplotlib

    return [matplotlib.colormaps["viridis"](rate / top) for rate in rates]
