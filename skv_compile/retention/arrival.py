"""What a forward of several tokens brings to a layer, and what of it the exact window lets go."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..lowering.layout import Layout
from ..lowering.reference.intake import Intake, Sources
from ..lowering.state import State
from .evidence import Exact, Whole

READ = ("coded", "new_coded", "length", "lead")  # of an intake, by the host


class Arrival:
    """A forward with keys and values [B, H, T, D] that ``intake`` has read against a layer's state
    as it was before. Waits for the device, once.

    ``failed`` []: what else than the intake says that nothing may be stored.

    ``begin``, ``end``: of every row, which tokens leave the exact window. ``bad``: nothing may be
    stored. ``first``: nothing is coded yet. ``whole``: the forward, if it begins a sequence.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        found: Intake,
        state: State,
        layout: Layout,
        failed: Tensor | None = None,
    ) -> None:
        self._k, self._v, self._state, self._layout = k, v, state, layout
        self.found = found
        bad = found.bad if failed is None else found.bad | failed
        wrong, self.begin, self.end, length, lead = torch.stack(
            [bad.expand_as(found.coded), *(getattr(found, name) for name in READ)]
        ).tolist()
        self.bad = k.is_cuda and bool(wrong[0])
        self.first = not any(self.begin)
        self.whole = None if any(length) else Whole(k, v, found.lead, min(lead))
        self._alike = self.whole is not None and not any(lead) and len(set(self.end)) == 1
        self.count = max(b - a for a, b in zip(self.begin, self.end, strict=True))

    @cached_property
    def _sources(self) -> Sources:
        exact = self._state.exact_keys, self._state.exact_values
        return Sources(self._k, self._v, *exact, self.found, self._layout)

    def exact(self) -> Exact:
        """All exact tokens: those there were, and the forward's own."""
        if self.whole is not None:
            return self.whole.exact(self._layout)
        return Exact.of_forward(self._sources, self.found, self._state, self._layout)

    def leaving(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens that leave: k, v [B, H, count, D] and i [B, count], of which those of a row
        from its ``found.new_coded`` on are none."""
        found, sinks = self.found, self._layout.sinks
        i = found.coded[:, None] + torch.arange(self.count, device=self._k.device)
        if self._alike:  # as they came
            own = slice(sinks, sinks + self.count)
            return self._k[:, :, own], self._v[:, :, own], i
        where = torch.minimum(i, found.new_coded[:, None] - 1).clamp(min=0)
        if self.whole is not None:
            return *self.whole.pick(where + sinks), i
        return *self._sources.pick(where), i
