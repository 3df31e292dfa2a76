"""A slice written whole: `cache[:, :, a:b] = new`, `cache[:, :, a:b].copy_(new)` and
`cache.narrow(2, a, n).copy_(new)`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch.fx import Node

from .indexing import is_step_one
from .nodes import Int, arguments, first_argument, integer, known, op_name, same, tensor
from .sites import CacheWrite
from .slots import slot_entry


class _Span(NamedTuple):
    cache: Node
    start: Any
    length: Int


def recognise(node: Node) -> CacheWrite | None:
    """The write a node performs, None if it is not this spelling."""
    target = first_argument(node)
    if target is None:
        return None
    erase: tuple[Node, ...]
    if op_name(node) == "setitem":
        span, erase = _sliced(target, node.args[1]), (node,)
    elif op_name(node) == "copy_":
        span, erase = _viewed(target), (node, target)
    else:
        return None
    source = node.args[-1]
    if span is None or span.cache.op != "placeholder" or not isinstance(source, Node):
        return None
    new = tensor(source)
    if new is None or new.dim() != 4 or not same(new.shape[2], span.length):
        return None  # broadcast along the slots: not one token for each slot
    return CacheWrite(
        "slice_copy", node, erase, span.cache, source, span.start, position_is_start=True
    )


def _viewed(view: Node) -> _Span | None:
    cache = first_argument(view)
    if cache is None:
        return None
    if op_name(view) == "getitem":
        return _sliced(cache, view.args[1])
    if op_name(view) == "narrow":
        call = arguments(view, "self dim start length")
        length = integer(call["length"])
        if integer(call["dim"]) in (2, -2) and length is not None and _is_start(call["start"]):
            return _Span(cache, call["start"], length)
    return None


def _sliced(cache: Node, index: Any) -> _Span | None:
    entry, fake = slot_entry(index, cache), tensor(cache)
    if not is_step_one(entry) or fake is None:
        return None
    start = 0 if entry.start is None else entry.start
    end = fake.shape[2] if entry.stop is None else integer(entry.stop)
    first = integer(start)
    if first is None or end is None or not _is_start(start):
        return None
    return _Span(cache, start, end - first)


def _is_start(start: Any) -> bool:
    """True for an int, or a node that holds one, known to count from the front."""
    first = integer(start)
    return first is not None and known(first >= 0)
