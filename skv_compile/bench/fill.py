"""Caches that look like those of a long prompt, without running one: random codes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..cache.state import LayerState
from ..lowering.state import CODED, LENGTH
from ..retention.tokens import Content, Tokens

#: Of all coded tokens, the share in each tier, the rest dropped, by the number of tiers and the
#: bits: what rdr made of six documents at head dim 64 (benchmarks/results/retention.json), where
#: there are five tiers, and of as many bits in three.
SHARES: dict[int, dict[float, tuple[float, ...]]] = {
    5: {
        1.125: (0.42, 0.059, 0.088, 0.048, 0.029),
        2.125: (0.384, 0.115, 0.178, 0.121, 0.143),
        3.125: (0.133, 0.092, 0.191, 0.223, 0.353),
    },
    3: {1.125: (0.475, 0.15, 0.04), 2.125: (0.46, 0.32, 0.175), 3.125: (0.17, 0.4, 0.43)},
}


def fill(states: Sequence[LayerState], tokens: int, shares: Sequence[float] | None = None) -> None:
    """Let layers of one pool hold ``tokens`` random tokens a row.

    ``shares``: of the coded tokens, in each tier where pages are tracked; the rest is dropped. By
    default those of ``SHARES``. More than the pool holds raises CacheStateError.
    """
    pool, layout = states[0].keeper.pool, states[0].layout
    device = pool.device
    coded = max(0, tokens - layout.sinks - layout.recent) // layout.stride * layout.stride
    for state in states:
        t = state.tensors
        t.exact_keys.normal_()
        t.exact_values.normal_()
        t.meta[:, LENGTH], t.meta[:, CODED] = tokens, coded
        if state.counter is not None:
            state.counter.fill_(tokens)
    pool.schedule.changed()
    states[0].keeper.full()
    if not layout.tracked:
        pool.memory.random_(0, 256)
        for name, field in layout.fields[0].items():
            if name.endswith("radius"):
                pool.memory[:, field.slice] = _bytes(pool.pages, field.size, device, True)
        return
    if shares is None:
        shares = SHARES[len(layout.tiers)][states[0].config.bits]
    groups = pool.layers * pool.batch * pool.heads
    edges = torch.tensor(list(shares), device=device).cumsum(0)
    found: list[list[Tokens]] = [[] for _ in layout.tiers]
    for group in range(groups):
        tier = torch.bucketize(torch.rand(coded, device=device), edges)
        tier[tier >= len(shares)] = len(layout.tiers)  # dropped
        for n in range(len(layout.tiers)):
            i = (tier == n).nonzero().squeeze(1)
            one = torch.ones(len(i), device=device)
            alike = torch.full_like(i, group), i, torch.full_like(i, n + 1)
            found[n].append(Tokens(*alike, one, one, one, torch.zeros_like(i, dtype=torch.bool)))
    tokens_of = [Tokens.cat(parts) for parts in found]
    records = [
        {
            name: _bytes(len(t), field.size // layout.capacity[n], device, "radius" in name)
            for name, field in layout.fields[n].items()
        }
        for n, t in enumerate(tokens_of)
    ]
    pool.write(Content(tokens_of, records))


def _bytes(n: int, width: int, device: torch.device, radius: bool) -> torch.Tensor:
    low, high = (110, 140) if radius else (0, 256)
    return torch.randint(low, high, (n, width), device=device, dtype=torch.uint8)
