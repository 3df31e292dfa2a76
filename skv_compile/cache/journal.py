"""A forward that fails halfway leaves no trace.

Layers store their tokens one after another; if layer 7 raises, layers 0 to 6 have
already stored theirs. The journal remembers what each layer looked like.
"""

from __future__ import annotations

import threading

from torch import Tensor

from ..errors import CacheStateError
from .state import LayerState, Undo


class Journal:
    """What the forward in progress has touched.

    On an accelerator nothing is raised in the middle of a forward, and nothing is kept.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[LayerState, Undo, Tensor | None]] = {}
        self.dense_layers = 0  # layers of the same cache that cannot be put back
        self.spoiled = False
        # "of": the thread of the forward in progress. A dict, for setdefault is atomic.
        self._thread: dict[str, int] = {}

    def begin(self) -> None:
        """A forward begins in this thread.

        Raises:
            CacheStateError: as :meth:`check`.
        """
        self._thread.setdefault("of", threading.get_ident())
        self.check()

    def check(self) -> None:
        """Refuse a thread while a forward of another one is in progress.

        Raises:
            CacheStateError: it is.
        """
        if not self._mine:
            raise CacheStateError(
                "A forward of another thread is not over, and a cache serves one at a time. Give "
                "each thread a SphericalCache of its own; if that forward failed, call "
                "cache.reset()."
            )

    @property
    def _mine(self) -> bool:
        mine = threading.get_ident()
        return self._thread.get("of", mine) == mine

    def end(self) -> None:
        """The forward in progress has reached the last layer; it may still be undone."""
        self._thread.clear()

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

    @property
    def open(self) -> bool:
        """Whether nobody has said yet that the last forward is over."""
        return bool(self._entries)

    def forget(self) -> None:
        """The last forward stands: forget what it would take to undo it."""
        self._entries.clear()

    def commit(self) -> None:
        """The forward in progress is over, and stands."""
        self.forget()
        self.end()

    def rollback(self) -> None:
        """Put every layer of the failed forward back as it was, if it is one of this thread."""
        if not self._mine:
            return
        if self._entries and self.dense_layers:
            self.spoiled = True
        for state, undo, counter in self._entries.values():
            state.restore(undo)
            if counter is not None and state.counter is not None:
                state.counter.copy_(counter)
        self._entries.clear()
        self.end()
