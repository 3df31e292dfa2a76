"""The ops of a rewritten attention: schemas, fakes, and the eager reference behind them.

``attend`` reads the state as it was before the forward, plus the forward's own keys and
values. ``calibrate`` stands where a forward may begin a sequence: it fits the frames that
tokens are coded in. ``retain`` is the decision what stored tokens are worth: of a forward of one
token it keeps the query, as evidence for the decisions between steps, and can be captured in a
CUDA graph; ``retain_many`` hands a longer forward to whoever keeps the pool, which stores what
the exact window will not hold. ``append`` then stores the rest, in sinks and window. In this
order no op reads what another has just written, so functionalisation never has a reason to copy
a cache.

``skv::slots`` marks, in a traced graph, the positions that a compressed cache is written at.
The pass replaces it; a graph that reaches its implementation was never rewritten.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from . import choice, kernels, reference
from .cpu import kernels as cpu
from .errors import SkvError
from .layout import Layout
from .state import State
from .work import Work

_BASIS = ("into", "back", "grid", "plan")
_FRAMES = [f"{side}_{part}" for side in ("key", "value") for part in _BASIS] + ["loss"]
_EXACT = ("exact_keys", "exact_values", "queries", "meta")
_REST = ("pool", "info", "table", "visits", "segments", "first", "turn", *_FRAMES)
assert (*_EXACT, *_REST) == State._fields


def _mutable(names: Sequence[str], first: str = "a") -> str:
    return ", ".join(f"Tensor({chr(ord(first) + n)}!) {name}" for n, name in enumerate(names))


_STATE = ", ".join(f"Tensor {name}" for name in State._fields)

ATTEND_SCHEMA = (
    "attend(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor position, "
    f"{_STATE}, bool causal, float scale, str layout) -> Tensor"
)
RETAIN_SCHEMA = (
    "retain(Tensor q, Tensor position, Tensor(a!) queries, Tensor meta, str layout) -> ()"
)
RETAIN_MANY_SCHEMA = (
    "retain_many(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor position, "
    f"{_mutable(_EXACT)}, {', '.join(f'Tensor {name}' for name in _REST)}, "
    "float scale, int site) -> ()"
)
APPEND_SCHEMA = (
    f"append(Tensor k, Tensor v, Tensor? mask, Tensor position, {_mutable(_EXACT)}, "
    "str layout) -> ()"
)
CALIBRATE_SCHEMA = (
    "calibrate(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor position, Tensor turn, "
    f"{_mutable(_FRAMES)}, str layout) -> ()"
)

# Library.define/impl instead of custom_op: 1 us a call instead of 15, twice a layer.
_lib = torch.library.Library("skv", "DEF")
_lib.define("slots(Tensor start, int tokens) -> Tensor")
_lib.define(ATTEND_SCHEMA)
_lib.define(RETAIN_SCHEMA)
_lib.define(APPEND_SCHEMA)
# An eigendecomposition, and a pool's decisions, wait for the device: graphs that have them are
# replayed without capture.
_lib.define(CALIBRATE_SCHEMA, tags=(torch.Tag.cudagraph_unsafe,))
_lib.define(RETAIN_MANY_SCHEMA, tags=(torch.Tag.cudagraph_unsafe,))


class Keeping(Protocol):
    """A layer that takes tokens over (``LayerState.retain``)."""

    def retain(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        position: Tensor,
        scale: float,
        state: State | None = None,
    ) -> None: ...


class _Running(threading.local):
    """The layers of the graphs that this thread is running, innermost last."""

    def __init__(self) -> None:
        self.stack: list[Sequence[Keeping]] = []


_running = _Running()


@contextmanager
def running(layers: Sequence[Keeping]) -> Iterator[None]:
    """While a graph runs: the layers behind its sites, in order, for ``retain_many``.

    Pages belong to all layers together, so they are no argument that a graph could own.
    """
    _running.stack.append(layers)
    try:
        yield
    finally:
        _running.stack.pop()


def _attend(q, k, v, mask, position, *rest) -> Tensor:
    *state, causal, scale, layout = rest
    return reference.attend(
        q, k, v, mask, position, State(*state), causal, scale, Layout.parse(layout)
    )


def _refusal(layout, q, k, mask, position, state, causal) -> str | None:
    # Of several tokens, the reference says what is wrong with them and does a prompt's first.
    heads, begins = state.queries.shape[1], lambda: int(position[0]) == 0
    return choice.refusal(layout, q, k, mask, heads, causal, begins)


def _attend_cuda(q, k, v, mask, position, *rest) -> Tensor:
    *tensors, causal, scale, layout_key = rest
    state, layout = State(*tensors), Layout.parse(layout_key)
    reason = _refusal(layout, q, k, mask, position, state, causal)
    if reason is None:
        one = q.shape[2] == 1
        work = Work(state.visits, state.segments, state.first) if one else None
        with torch.cuda.device(q.device):  # Triton launches on the current one
            return kernels.attend(q, k, v, mask, position, state, scale, layout, work=work)
    kernels.say(reason)
    return reference.attend(q, k, v, mask, position, state, causal, scale, layout)


def _attend_cpu(q, k, v, mask, position, *rest) -> Tensor:
    *tensors, causal, scale, layout_key = rest
    state, layout = State(*tensors), Layout.parse(layout_key)
    reason = _refusal(layout, q, k, mask, position, state, causal)
    if reason is None:
        return cpu.attend(q, k, v, mask, position, state, scale, layout)
    kernels.say(reason, "natively")
    return reference.attend(q, k, v, mask, position, state, causal, scale, layout)


def _retain(q, position, queries, meta, layout) -> None:
    reference.retain(q, position, queries, meta, Layout.parse(layout))


def _retain_many(q, k, v, mask, position, *rest) -> None:
    *state, scale, site = rest
    if not _running.stack:
        raise SkvError("a graph with a compressed cache was run without the backend that made it.")
    _running.stack[-1][site].retain(q, k, v, mask, position, scale, State(*state))


def _append(k, v, mask, position, exact_keys, exact_values, queries, meta, layout) -> None:
    reference.append(k, v, mask, position, exact_keys, exact_values, meta, Layout.parse(layout))


def _append_cpu(k, v, mask, position, exact_keys, exact_values, queries, meta, layout) -> None:
    rest = (exact_keys, exact_values, meta, Layout.parse(layout))
    if not cpu.append(k, v, mask, position, *rest):
        reference.append(k, v, mask, position, *rest)


def _append_cuda(k, v, mask, position, exact_keys, exact_values, queries, meta, layout) -> None:
    rest = (exact_keys, exact_values, meta, Layout.parse(layout))
    if kernels.one_token(k):
        from . import store

        with torch.cuda.device(k.device):
            store.append(k, v, mask, position, *rest)
    else:
        reference.append(k, v, mask, position, *rest)


def _retain_cpu(q, position, queries, meta, layout) -> None:
    rest = (position, queries, meta, Layout.parse(layout))
    if not cpu.retain(q, *rest):
        reference.retain(q, *rest)


def _retain_cuda(q, position, queries, meta, layout) -> None:
    if kernels.one_token(q):
        from . import store

        with torch.cuda.device(q.device):
            store.retain(q, position, queries, meta, Layout.parse(layout))
    else:
        reference.retain(q, position, queries, meta, Layout.parse(layout))


def _calibrate(q, k, v, mask, position, turn, *rest) -> None:
    *frames, layout = rest
    reference.calibrate(q, k, v, mask, position, turn, frames, Layout.parse(layout))


def _slots(start: Tensor, tokens: int) -> Tensor:
    raise SkvError(
        "A graph with a SphericalCache was compiled, but the attention that reads it was not "
        "rewritten, so it would read nothing. Compile with backend='skv' and look at "
        "skv.explain(model, ...), or run the model uncompiled."
    )


def _nothing(*args: Any) -> None:
    """The fake of an op that only writes."""


_IMPLEMENTATIONS = {
    "slots": _slots,
    "attend": _attend,
    "retain": _retain,
    "retain_many": _retain_many,
    "append": _append,
    "calibrate": _calibrate,
}
for _name, _function in _IMPLEMENTATIONS.items():
    _lib.impl(_name, _function, "CompositeExplicitAutograd")
    if _name not in ("slots", "attend"):
        torch.library.register_fake(f"skv::{_name}", _nothing, lib=_lib)
_lib.impl("attend", _attend_cpu, "CPU")
_lib.impl("append", _append_cpu, "CPU")
_lib.impl("retain", _retain_cpu, "CPU")
_lib.impl("attend", _attend_cuda, "CUDA")
_lib.impl("append", _append_cuda, "CUDA")
_lib.impl("retain", _retain_cuda, "CUDA")


@torch.library.register_fake("skv::slots", lib=_lib)
def _slots_fake(start, tokens) -> Tensor:
    return start.new_empty((tokens,))


@torch.library.register_fake("skv::attend", lib=_lib)
def _attend_fake(q, k, v, mask, position, *rest) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


slots = torch.ops.skv.slots.default
attend = torch.ops.skv.attend.default
retain = torch.ops.skv.retain.default
retain_many = torch.ops.skv.retain_many.default
append = torch.ops.skv.append.default
calibrate = torch.ops.skv.calibrate.default

__all__ = [
    "append",
    "attend",
    "calibrate",
    "retain",
    "retain_many",
    "running",
    "slots",
]
