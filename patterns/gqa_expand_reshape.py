"""Repeated heads as `x[:, :, None].expand(b, h, n, s, d).reshape(b, h * n, s, d)`: `repeat_kv`."""

from __future__ import annotations

from torch.fx import Node

from .layout import BATCH, CACHE_AXES, DIM, HEAD, NEW, REPEAT, SLOT, Layout, shapes, unreadable
from .nodes import constant, same, same_shape
from .read_views import copy


def expand(node: Node, layout: Layout) -> Layout:
    """`expand` along an axis of size one that stands for nothing yet."""
    before, after = shapes(node)
    if not before or len(before) != len(after):
        raise unreadable(node, "adds axes")
    axes = list(layout.axes)
    for i, (axis, old, new) in enumerate(zip(layout.axes, before, after, strict=True)):
        if same(old, new):
            continue
        if axis != NEW:
            raise unreadable(node, f"repeats the {axis} axis")
        axes[i] = REPEAT
    return layout.moved(axes)


def merge(node: Node, layout: Layout) -> Layout:
    """`reshape`, `view` or `flatten`, merging a head with its repeats."""
    layout = copy(node, layout)  # `view(dtype)` is a reinterpretation, not a view of the axes
    before, after = shapes(node)
    if same_shape(before, after):
        return layout
    merged = tuple(HEAD if axis in (NEW, REPEAT) else axis for axis in layout.axes)
    if merged == (BATCH, HEAD, HEAD, SLOT, DIM):
        batch, first, second, slot, dim = before
        if same_shape(after, (batch, first * second, slot, dim)):
            if layout.axes[1] == REPEAT:
                raise unreadable(node, "puts the repeats of all heads before one another", "gqa")
            repeats = constant(second)
            if repeats is None:
                raise unreadable(node, "repeats heads a number of times the graph does not fix")
            if repeats == 1:
                return layout.moved(CACHE_AXES)
            return layout.repeated("expand_reshape", repeats, node)
    raise unreadable(node, "changes the shape to something other than repeated heads")
