"""What a forward of several tokens brings to a layer, and what of it the exact window lets go."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..lowering.layout import Layout
from ..lowering.reference.intake import Sources, intake
from ..lowering.state import State
from .evidence import Whole

READ = ("coded", "new_coded", "length", "lead")  # of an intake, by the host


class Arrival:
    """Read against a layer's state as it is before the forward. Waits for the device, once.

    ``found``: the intake. ``begin``, ``end``: of every row, which tokens leave the exact window.
    ``bad``: nothing may be stored. ``first``: nothing is coded yet. ``whole``: the forward, if it
    begins a sequence.

    Raises:
        NonFiniteError, CapacityError, CacheStateError: as ``append``.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        position: Tensor,
        state: State,
        layout: Layout,
    ) -> None:
        self._k, self._v, self._state, self._layout = k, v, state, layout
        found = self.found = intake(k, v, mask, position, state.meta, layout)
        bad, self.begin, self.end, length, lead = torch.stack(
            [found.bad.expand_as(found.coded), *(getattr(found, name) for name in READ)]
        ).tolist()
        self.bad = k.is_cuda and bool(bad[0])
        self.first = not any(self.begin)
        self.whole = None if any(length) else Whole(k, v, found.lead, min(lead))
        self._alike = self.whole is not None and not any(lead) and len(set(self.end)) == 1
        self.count = max(b - a for a, b in zip(self.begin, self.end, strict=True))

    @cached_property
    def sources(self) -> Sources:
        """All exact tokens, by i."""
        exact = self._state.exact_keys, self._state.exact_values
        return Sources(self._k, self._v, *exact, self.found, self._layout)

    def leaving(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens that leave: k, v [B, H, count, D] and i [B, count], of which those of a row
        from its ``found.new_coded`` on are none."""
        found, sinks = self.found, self._layout.sinks
        i = found.coded[:, None] + torch.arange(self.count, device=self._k.device)
        if self._alike:  # as they came
            own = slice(sinks, sinks + self.count)
            return self._k[:, :, own], self._v[:, :, own], i
        last = found.new_coded[:, None] - 1
        return *self.sources.pick(torch.minimum(i, last).clamp(min=0)), i
