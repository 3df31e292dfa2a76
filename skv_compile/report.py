"""What the pass did to each attention, in words, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from .cache.state import LayerState
from .codec.tiers import tier_names, tiers
from .forecast import forecast
from .patterns import Match
from .versions import versions


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
    tiers: dict[str, float] = field(default_factory=dict, hash=False)
    """The tiers that its tokens may get, and the bits per coordinate of each, coarse to fine."""
    bits_per_coordinate: float = 0.0
    retention: str = ""
    """The policy that decides at this cache update what stays, and how well."""
    dense_bytes: int = 0
    resident_bytes: int = 0
    kernel: str = ""
    """What computes this attention: "Triton", "native avx2", "PyTorch reference", ..."""
    kernel_reason: str = ""
    """Why this one; of the reference, why no kernel."""


@dataclass(frozen=True)
class GraphReport:
    """All attentions of one graph, in its order. ``plain``: attentions without a cache."""

    sites: tuple[SiteReport, ...]
    plain: int

    @staticmethod
    def of(found: Match, states: Sequence[LayerState]) -> GraphReport:
        rows: list[tuple[int, SiteReport]] = []
        choices = forecast(found.sites, states)
        for site, state, choice in zip(found.sites, states, choices, strict=True):
            row = SiteReport(
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
                tiers={tier.name: tier.rate for tier in tiers(state.layout)},
                bits_per_coordinate=rate_of(state),
                retention=state.config.retention,
                dense_bytes=state.dense_bytes,
                resident_bytes=state.resident_bytes,
                kernel=choice.kernel,
                kernel_reason=choice.why,
            )
            rows.append((site.index, row))
        for refusal in found.refusals:  # several may have the index of the end
            row = SiteReport(
                rewritten=False, reason=refusal.reason, where=refusal.where, code=refusal.code
            )
            rows.append((refusal.index, row))
        rows.sort(key=lambda pair: pair[0])
        return GraphReport(tuple(row for _, row in rows), len(found.plain))


@dataclass(frozen=True)
class Report:
    """What :func:`skv_compile.explain` returns.

    ``settings``: the fields of the :class:`Config` that was asked for. ``versions``: of what made
    the report.
    """

    graphs: tuple[GraphReport, ...]
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    versions: dict[str, str | None] = field(default_factory=versions, hash=False)

    @property
    def sites(self) -> list[SiteReport]:
        """Every attention that has a cache, rewritten or not."""
        return [site for graph in self.graphs for site in graph.sites]

    @property
    def plain(self) -> int:
        """Attentions without a cache."""
        return sum(graph.plain for graph in self.graphs)

    @property
    def rewritten(self) -> list[SiteReport]:
        """The attentions that were rewritten."""
        return [site for site in self.sites if site.rewritten]

    @property
    def refused(self) -> list[SiteReport]:
        """The attentions that were left dense, though they have a cache."""
        return [site for site in self.sites if not site.rewritten]

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense caches of all rewritten attentions."""
        return sum(site.dense_bytes for site in self.rewritten)

    @property
    def resident_bytes(self) -> int:
        """Bytes that are held in their place."""
        return sum(site.resident_bytes for site in self.rewritten)

    def to_dict(self) -> dict[str, Any]:
        return {
            "graphs": len(self.graphs),
            "rewritten": len(self.rewritten),
            "refused": len(self.refused),
            "without_cache": self.plain,
            "dense_bytes": self.dense_bytes,
            "resident_bytes": self.resident_bytes,
            "sites": [asdict(site) for site in self.sites],
            "settings": self.settings,
            "versions": self.versions,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def to_html(self, title: str = "skv explain") -> str:
        """The report as one HTML page that needs nothing else: no script, no file, no network.

        ``title``: such as the name of the model.
        """
        from .page import page

        return page(self, title)

    def summary(self) -> list[str]:
        """How many attentions were rewritten, and what that did to their bytes, in sentences."""
        lines = [
            f"{len(self.rewritten)} of {len(self.sites)} attentions with a cache rewritten, "
            f"{self.plain} without a cache, in {len(self.graphs)} graph(s)."
        ]
        if self.rewritten:
            lines.append(
                f"Their cache: {self.dense_bytes:,} bytes dense, {self.resident_bytes:,} bytes now."
            )
        return lines

    def __str__(self) -> str:
        lines = self.summary()
        for n, site in enumerate(self.sites):
            where = site.where or "unknown line"
            if site.rewritten:
                lines.append(
                    f"  {n:3d} rewritten  {where}  [{site.write}, gqa {site.gqa}]  "
                    f"{site.heads}/{site.kv_heads} heads of {site.head_dim}, "
                    f"{site.tier} at {site.bits_per_coordinate:.4g} bits, "
                    f"retain {site.retention}, on {site.kernel} ({site.kernel_reason})"
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
