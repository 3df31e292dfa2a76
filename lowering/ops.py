"""``skv::append`` and ``skv::attend``: schemas, fakes, and the eager reference behind them.

``attend`` reads the state as it was before the forward, plus the forward's own keys and
values; ``append`` then stores those. In this order no op reads what another has just
written, so functionalisation never has a reason to copy a pool. ``calibrate`` stands between
the two where a forward may begin a sequence: it fits the frames that ``append`` codes in.

``skv::slots`` marks, in a traced graph, the positions that a compressed cache is written at.
The pass replaces it; a graph that reaches its implementation was never rewritten.

``skv::retain``, the decision what stored tokens are worth, will take the same state
between the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .errors import SkvError
from .layout import Layout
from .state import State

_FRAMES = [
    f"{side}_{part}" for side in ("key", "value") for part in ("into", "grid", "plan", "out")
]
_CONSTANTS = ", ".join(f"Tensor {name}" for name in ("turn", *_FRAMES))
_STATE = f"Tensor exact_keys, Tensor exact_values, Tensor pool, Tensor meta, {_CONSTANTS}"
_MUTABLE_STATE = (
    "Tensor(a!) exact_keys, Tensor(b!) exact_values, Tensor(c!) pool, Tensor(d!) meta, "
    + _CONSTANTS
)

ATTEND_SCHEMA = (
    "attend(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor position, "
    f"{_STATE}, bool causal, float scale, str layout) -> Tensor"
)
APPEND_SCHEMA = (
    f"append(Tensor k, Tensor v, Tensor? mask, Tensor position, {_MUTABLE_STATE}, str layout) -> ()"
)

CALIBRATE_SCHEMA = (
    "calibrate(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor position, Tensor turn, "
    + ", ".join(f"Tensor({'abcdefgh'[n]}!) {name}" for n, name in enumerate(_FRAMES))
    + ", str layout) -> ()"
)

# Library.define/impl instead of custom_op: 1 us a call instead of 15, twice a layer.
_lib = torch.library.Library("skv", "DEF")
_lib.define("slots(Tensor start, int tokens) -> Tensor")
_lib.define(ATTEND_SCHEMA)
_lib.define(APPEND_SCHEMA)
# An eigendecomposition waits for the device: graphs that calibrate are replayed without capture.
_lib.define(CALIBRATE_SCHEMA, tags=(torch.Tag.cudagraph_unsafe,))


def _attend(q, k, v, mask, position, *rest) -> Tensor:
    *state, causal, scale, layout = rest
    return reference.attend(
        q, k, v, mask, position, State(*state), causal, scale, Layout.parse(layout)
    )


def _append(k, v, mask, position, *rest) -> None:
    *state, layout = rest
    reference.append(k, v, mask, position, State(*state), Layout.parse(layout))


def _calibrate(q, k, v, mask, position, turn, *rest) -> None:
    *frames, layout = rest
    reference.calibrate(q, k, v, mask, position, turn, frames, Layout.parse(layout))


def _slots(start: Tensor, tokens: int) -> Tensor:
    raise SkvError(
        "A graph with a SphericalCache was compiled, but the attention that reads it was not "
        "rewritten, so it would read nothing. Compile with backend='skv' and look at "
        "skv.explain(model, ...), or run the model uncompiled."
    )


_lib.impl("slots", _slots, "CompositeExplicitAutograd")
_lib.impl("attend", _attend, "CompositeExplicitAutograd")
_lib.impl("append", _append, "CompositeExplicitAutograd")
_lib.impl("calibrate", _calibrate, "CompositeExplicitAutograd")


@torch.library.register_fake("skv::slots", lib=_lib)
def _slots_fake(start, tokens) -> Tensor:
    return start.new_empty((tokens,))


@torch.library.register_fake("skv::attend", lib=_lib)
def _attend_fake(q, k, v, mask, position, *rest) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.register_fake("skv::append", lib=_lib)
def _append_fake(k, v, mask, position, *rest) -> None:
    return None


slots = torch.ops.skv.slots.default


@torch.library.register_fake("skv::calibrate", lib=_lib)
def _calibrate_fake(q, k, v, mask, position, turn, *rest) -> None:
    return None


calibrate = torch.ops.skv.calibrate.default
attend = torch.ops.skv.attend.default
append = torch.ops.skv.append.default
