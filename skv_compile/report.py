"""What the pass did to each attention, in words, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from .cache.state import LayerState
from .codec.tiers import tier_names
from .patterns import Match


@dataclass(frozen=True)
class SiteReport:
    """One attention that has a cache."""

    rewritten: bool
    reason: str
    """Why it was not rewritten: the first condition that failed. Empty if it was."""
    where: str
    """Source line of the attention, "package/file.py:123 in function"."""
    code: str = ""
    write: str = ""
    gqa: str = ""
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    max_tokens: int = 0
    tier: str = ""
    bits_per_coordinate: float = 0.0
    retention: str = ""
    """The policy that decides at this cache update what stays, and how well."""
    dense_bytes: int = 0
    resident_bytes: int = 0


@dataclass(frozen=True)
class GraphReport:
    """All attentions of one graph, in its order. ``plain``: attentions without a cache."""

    sites: tuple[SiteReport, ...]
    plain: int

    @staticmethod
    def of(found: Match, states: Sequence[LayerState]) -> GraphReport:
        rows: dict[int, SiteReport] = {}
        for site, state in zip(found.sites, states, strict=True):
            rows[site.index] = SiteReport(
                rewritten=True,
                reason="",
                where=site.where,
                write=site.key.spelling,
                gqa=site.gqa,
                heads=state.heads * site.group_size,
                kv_heads=state.heads,
                head_dim=state.layout.head_dim,
                max_tokens=state.layout.max_tokens,
                tier=tier_names(state.layout),
                bits_per_coordinate=rate_of(state),
                retention=state.config.retention,
                dense_bytes=state.dense_bytes,
                resident_bytes=state.resident_bytes,
            )
        for refusal in found.refusals:
            rows[refusal.index] = SiteReport(
                rewritten=False, reason=refusal.reason, where=refusal.where, code=refusal.code
            )
        return GraphReport(tuple(rows[n] for n in sorted(rows)), len(found.plain))


@dataclass(frozen=True)
class Report:
    """What :func:`skv_compile.explain` returns."""

    graphs: tuple[GraphReport, ...]

    @property
    def sites(self) -> list[SiteReport]:
        """Every attention that has a cache, rewritten or not."""
        return [site for graph in self.graphs for site in graph.sites]

    @property
    def plain(self) -> int:
        """Attentions without a cache."""
        return sum(graph.plain for graph in self.graphs)

    def to_dict(self) -> dict[str, Any]:
        return {
            "graphs": len(self.graphs),
            "rewritten": sum(site.rewritten for site in self.sites),
            "refused": sum(not site.rewritten for site in self.sites),
            "without_cache": self.plain,
            "sites": [asdict(site) for site in self.sites],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        done = [site for site in self.sites if site.rewritten]
        lines = [
            f"{len(done)} of {len(self.sites)} attentions with a cache rewritten, "
            f"{self.plain} without a cache, in {len(self.graphs)} graph(s)."
        ]
        if done:
            dense, small = (
                sum(getattr(site, name) for site in done)
                for name in ("dense_bytes", "resident_bytes")
            )
            lines.append(f"Their cache: {dense:,} bytes dense, {small:,} bytes now.")
        for n, site in enumerate(self.sites):
            where = site.where or "unknown line"
            if site.rewritten:
                lines.append(
                    f"  {n:3d} rewritten  {where}  [{site.write}, gqa {site.gqa}]  "
                    f"{site.heads}/{site.kv_heads} heads of {site.head_dim}, "
                    f"{site.tier} at {site.bits_per_coordinate:.4g} bits, "
                    f"retain {site.retention}"
                )
            else:
                lines.append(f"  {n:3d} NOT        {where}  ({site.code}) {site.reason}")
        return "\n".join(lines)


def rate_of(state: LayerState) -> float:
    """Bits per coordinate that a layer's tokens are given."""
    rule, layout = state.keeper.rule, state.layout
    if not layout.tracked:
        return layout.rate(0)
    coordinates = max(1, 2 * layout.head_dim * rule.groups * layout.max_coded)
    return rule.bits if rule.bits is not None else 8 * state.keeper.pool.bytes / coordinates


_listeners: list[Callable[[GraphReport], None]] = []


def record(graph: GraphReport) -> None:
    """Called by the backend for every graph it sees."""
    for listener in _listeners:
        listener(graph)


@contextmanager
def listening() -> Iterator[list[GraphReport]]:
    """Collect the reports of all graphs compiled inside the block."""
    graphs: list[GraphReport] = []
    _listeners.append(graphs.append)
    try:
        yield graphs
    finally:
        _listeners.remove(graphs.append)
