"""A forward that fails halfway leaves no trace.

Layers store their tokens one after another; if layer 7 raises, layers 0 to 6 have
already stored theirs. The journal remembers what each layer looked like.
"""

from __future__ import annotations

from torch import Tensor

from .state import LayerState, Undo


class Journal:
    """What the forward in progress has touched.

    On an accelerator nothing is raised in the middle of a forward, and nothing is kept.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[LayerState, Undo, Tensor | None]] = {}
        self.dense_layers = 0  # layers of the same cache that cannot be put back
        self.spoiled = False

    def record(self, state: LayerState, tokens: int) -> None:
        """Remember a layer before ``tokens`` tokens are written to it.

        A layer seen twice means that a new forward has begun.
        """
        if state.device.type != "cpu":
            return
        if id(state) in self._entries:
            self._entries.clear()
        counter = None if state.counter is None else state.counter.clone()
        self._entries[id(state)] = (state, state.snapshot(tokens), counter)

    def commit(self) -> None:
        """The forward is over: forget what it would take to undo it."""
        self._entries.clear()

    def rollback(self) -> None:
        """Put every layer of the failed forward back as it was."""
        if self._entries and self.dense_layers:
            self.spoiled = True
        for state, undo, counter in self._entries.values():
            state.restore(undo)
            if counter is not None and state.counter is not None:
                state.counter.copy_(counter)
        self._entries.clear()
