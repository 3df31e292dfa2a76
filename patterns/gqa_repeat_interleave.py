"""Repeated heads as `x.repeat_interleave(n, dim=1)`: gpt-fast and many hand-written models."""

from __future__ import annotations

from torch.fx import Node

from .layout import CACHE_AXES, HEAD, Layout, axis_of, unreadable
from .nodes import arguments, constant, integer


def repeat_interleave(node: Node, layout: Layout) -> Layout:
    """Each head, n times in a row."""
    call = arguments(node, "self repeats dim", dim=None)
    given, dim = integer(call["repeats"]), integer(call["dim"])
    repeats = None if given is None else constant(given)
    if repeats is None or not isinstance(dim, int):
        raise unreadable(node, "repeats by a tensor, or without naming an axis")
    if layout.axes != CACHE_AXES or layout.axes[axis_of(dim, 4)] != HEAD:
        raise unreadable(node, f"repeats the {layout.axes[axis_of(dim, 4)]} axis")
    return layout.repeated("repeat_interleave", repeats, node) if repeats > 1 else layout


def repeat(node: Node, layout: Layout) -> Layout:
    """`x.repeat(1, n, 1, 1)`: the tempting misspelling, which is a different attention."""
    raise unreadable(
        node,
        "tiles the heads (0 1 0 1) where grouped-query attention has them in a row (0 0 1 1): "
        "`repeat_interleave` is meant",
        "gqa",
    )
