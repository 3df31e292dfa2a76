"""What a cache holds at this moment, in numbers: what pictures of it are drawn from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import CacheStateError
from .lowering.state import LENGTH
from .retention import map as kept

if TYPE_CHECKING:
    from .cache.spherical import SphericalCache

DROPPED, EXACT = "dropped", "in the exact window"


@dataclass(frozen=True)
class Look:
    """One row of a cache, between two forwards.

    ``tokens`` of the row, and ``max_tokens`` that fit; ``resident_bytes``, ``dense_bytes`` and
    ``bits_per_coordinate`` as the cache says them. R counts every (compressed layer, kv head), in
    the order of the layers: ``layers`` and ``heads`` [R] are their numbers.
    ``tiers``, ``rates``: names, and bits per coordinate with full pages, coarse to fine.
    ``levels`` [R, tokens] uint8: 0 is dropped, n is stored in ``tiers[n - 1]``, and
    ``len(tiers) + 1`` is exact: a sink, or in the recent window.
    ``bits`` [R]: bits per coordinate really stored of the tokens that have left the exact window,
    NaN where none has.
    """

    tokens: int
    max_tokens: int
    resident_bytes: int
    dense_bytes: int
    bits_per_coordinate: float
    layers: np.ndarray
    heads: np.ndarray
    tiers: tuple[str, ...]
    rates: tuple[float, ...]
    levels: np.ndarray
    bits: np.ndarray

    @property
    def exact(self) -> int:
        """The level of the exact window."""
        return len(self.tiers) + 1

    @property
    def names(self) -> tuple[str, ...]:
        """Of every level."""
        return (DROPPED, *self.tiers, EXACT)

    @property
    def counts(self) -> dict[str, int]:
        """How many tokens of all heads are at which level; the sum is ``levels.size``."""
        found = np.bincount(self.levels.ravel(), minlength=self.exact + 1).tolist()
        return dict(zip(self.names, found, strict=True))

    @property
    def kept(self) -> int:
        """Tokens of all heads that are stored, exact or coded."""
        return int((self.levels > 0).sum())

    @property
    def dropped(self) -> int:
        """Tokens of all heads that are not."""
        return self.levels.size - self.kept

    def grid(self, values: np.ndarray) -> np.ndarray:
        """[kv heads, layers]: one of ``values`` [R] for each; NaN where a layer has fewer heads."""
        columns = {layer: n for n, layer in enumerate(dict.fromkeys(self.layers.tolist()))}
        table = np.full((int(self.heads.max()) + 1, len(columns)), np.nan)
        table[self.heads, [columns[layer] for layer in self.layers.tolist()]] = values
        return table

    def strips(self, bins: int, bands: int) -> tuple[np.ndarray, np.ndarray]:
        """The sequence in at most ``bins`` parts, the layers in at most ``bands``.

        Returns:
            [bands, bins] mean bits per coordinate of the tokens there, dropped ones as 0 and exact
            ones as the finest tier; and [bands, bins] the share that is exact.
        """
        rates = np.array([0.0, *self.rates, max(self.rates)])
        cuts = np.unique(
            np.linspace(0, self.tokens, min(bins, self.tokens) + 1).round().astype(int)
        )
        split = np.array_split(np.unique(self.layers), min(bands, len(np.unique(self.layers))))
        rows = [self.levels[np.isin(self.layers, band)] for band in split]
        width = np.diff(cuts)

        def mean(x: np.ndarray) -> np.ndarray:
            return np.add.reduceat(x.mean(0), cuts[:-1]) / width

        return (
            np.stack([mean(rates[row]) for row in rows]),
            np.stack([mean(row == self.exact) for row in rows]),
        )

    def to_dict(self) -> dict[str, Any]:
        """The few numbers that a turn's record needs, for JSON."""
        return {
            "tokens": self.tokens,
            "max_tokens": self.max_tokens,
            "resident_bytes": self.resident_bytes,
            "dense_bytes": self.dense_bytes,
            "bits_per_coordinate": self.bits_per_coordinate,
            "heads": len(self.heads),
            "counts": self.counts,
        }


def look_at(cache: SphericalCache, row: int = 0) -> Look:
    """The numbers of one row of a cache.

    Raises:
        CacheStateError: the cache has not seen a token yet.
    """
    found: dict[str, list[Any]] = {"layers": [], "heads": [], "bits": [], "levels": []}
    first, tokens = None, 0
    for number, state, coded in kept.layers_of(cache, row):
        if first is None:
            first, tokens = state.layout, int(state.tensors.meta[row, LENGTH])
        heads, count = coded.shape
        levels = np.full((heads, tokens), len(first.tiers) + 1, dtype=np.uint8)
        levels[:, state.layout.sinks : state.layout.sinks + count] = coded
        found["levels"].append(levels)
        found["layers"] += [number] * heads
        found["heads"] += range(heads)
        found["bits"] += kept.bits_of(state, row) if count else [np.nan] * heads
    if first is None or tokens == 0:
        raise CacheStateError("the cache has not seen a token yet: run the model first.")
    tiers = kept.tiers_of(first)
    return Look(
        tokens=tokens,
        max_tokens=cache.max_cache_len,
        resident_bytes=cache.resident_bytes,
        dense_bytes=cache.dense_bytes,
        bits_per_coordinate=cache.bits_per_coordinate,
        layers=np.array(found["layers"]),
        heads=np.array(found["heads"]),
        tiers=tuple(tiers["tiers"]),
        rates=tuple(tiers["rates"]),
        levels=np.concatenate(found["levels"]),
        bits=np.array(found["bits"], dtype=float),
    )
