"""Prompts of layers that follow one another, held until they are worked on together.

Fitting, judging and coding a layer are many small operations whatever the number of heads, and
heads do not know of each other. So the layers of a short prompt wait for one another, as heads of
one: a long prompt, of which a single layer is large, waits for none. Nor does any on a CPU, where
it would gain nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..lowering.layout import Layout
from ..lowering.reference.calibrate import fit_beginning
from ..lowering.reference.intake import Intake, leading, own_validity
from ..lowering.reference.statistics import sample_queries
from ..lowering.state import FIRST_FRAME, State
from .evidence import Queries, forward_queries

#: Of keys, values and queries that wait, and of what frames are fitted to; on CPUs.
BYTES, CPU_BYTES = 5 << 27, 0
MOST_HEADS = 1 << 15  # of all rows; a grid of programs has no more than twice as many
SAMPLED = 768, 2304  # queries and tokens of a layer at most that are kept or fitted to


class Bundle:
    """Layers from ``first`` on, at most ``most``, of forwards alike that begin a sequence.

    Args:
        k, mask, position: of the first layer, as for ``append``; ``found``: its intake.
        way: ``Policy.queries``. scale: of the logits.
    """

    def __init__(
        self,
        first: int,
        most: int,
        k: Tensor,
        mask: Tensor | None,
        position: Tensor,
        found: Intake,
        way: str,
        scale: float,
        layout: Layout,
    ) -> None:
        batch, self._heads, tokens, dim = k.shape
        self.first, self.count, self._most = first, 0, most
        self.found, self.scale = found, scale
        self._mask, self._position, self._layout, self._way = mask, position, layout, way
        self._valid = own_validity(mask, position, batch)
        self._lead = leading(self._valid)
        self._k, self._v = (k.new_empty(batch, most * self._heads, tokens, dim) for _ in range(2))
        self._sampled: list[Tensor] = []
        self._queries: list[Queries] = []

    @staticmethod
    def size(q: Tensor, k: Tensor, layers: int) -> int:
        """Of ``layers`` layers with queries and keys like these, how many may wait for one
        another."""
        queries, tokens = SAMPLED
        kept = q[:, :, 0].nbytes * min(q.shape[2], queries)
        fitted = 2 * 4 * k.shape[1] * k.shape[3] * min(k.shape[0] * k.shape[2], tokens)
        room = CPU_BYTES if k.device.type == "cpu" else BYTES
        rows = k.shape[0] * k.shape[1]
        most = min(room // max(1, 2 * k.nbytes + kept + fitted), MOST_HEADS // max(1, rows))
        return max(1, min(layers, most))

    @property
    def layers(self) -> range:
        return range(self.first, self.first + self.count)

    @property
    def full(self) -> bool:
        return self.count == self._most

    def takes(self, layer: int, k: Tensor, mask: Tensor | None, scale: float) -> bool:
        """Whether the forward of a layer is one of these."""
        batch, heads, tokens, dim = k.shape
        alike = (batch, self._most * heads, tokens, dim) == tuple(self._k.shape)
        follows = layer == self.first + self.count and not self.full
        return alike and follows and _same(mask, self._mask) and scale == self.scale

    def add(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Take queries [B, Hq, T, D], keys and values of the next layer."""
        own = slice(self.count * self._heads, (self.count + 1) * self._heads)
        self._k[:, own], self._v[:, own] = k, v
        if self._fits:
            self._sampled.append(sample_queries(q, self._lead, self._heads))
        self._queries.append(forward_queries(q, self.found, self._layout, self._way))
        self.count += 1

    @property
    def k(self) -> Tensor:
        """[B, n * H, T, D] keys."""
        return self._k[:, : self.count * self._heads]

    @property
    def v(self) -> Tensor:
        """[B, n * H, T, D] values."""
        return self._v[:, : self.count * self._heads]

    @property
    def _fits(self) -> bool:
        return 0 < self._layout.calibrate <= self._k.shape[2]

    def fit(self, plan: Tensor) -> list[tuple[Tensor, ...]]:
        """The frame tensors of every layer; none where there are no new ones."""
        if not self._fits:
            return []
        own = (torch.cat(self._sampled, 1), self.k, self.v, self._valid, self._position)
        found = fit_beginning(*own, plan, self._layout)
        if found is None:
            return []
        return list(zip(*(x.split(self._heads) for x in found), strict=True))

    def queries(self) -> Queries:
        """What to judge by, of all heads."""
        q = torch.cat([x.q for x in self._queries], 1)
        return Queries(q, self._queries[0].i, self._queries[0].live)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether both are views of the same numbers, or None."""
    if a is None or b is None:
        return a is b
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())


def joined(states: list[State]) -> State:
    """The frames of some layers as those of the heads of one."""
    first = states[0]
    if len(states) == 1:
        return first
    frames = (
        torch.cat(x) if x[0].dim() > 1 else x[0]
        for x in zip(*(state[FIRST_FRAME:] for state in states), strict=True)
    )
    return State(*first[:FIRST_FRAME], *frames)
