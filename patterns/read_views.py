"""Reads that repeat nothing: slices of the sequence, new axes, transposes, copies."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from .indexing import entries, is_full, is_prefix
from .layout import BATCH, NEW, SLOT, Layout, axis_of, shapes, unreadable
from .nodes import arguments, integer, known, op_name, tensor


def index(node: Node, layout: Layout) -> Layout:
    """`cache[:, :, :end]` and `cache[:, :, None]`."""
    before, _ = shapes(node)
    if len(before) != len(layout.axes):
        raise unreadable(node, "indexes something the graph records no shape for")
    axes, remaining = [], list(zip(layout.axes, before, strict=True))
    for entry in entries(node.args[1], len(layout.axes)):
        if entry is None:
            axes.append(NEW)
            continue
        axis, size = remaining.pop(0)
        if axis == SLOT and is_prefix(entry) and not is_full(entry, size):
            layout = _until(node, layout, entry.stop)
        elif not is_full(entry, size):
            raise unreadable(
                node,
                f"selects part of the {axis} axis",
                code="batch" if axis == BATCH else "read-view",
            )
        axes.append(axis)
    return layout.moved(axes)


def narrow(node: Node, layout: Layout) -> Layout:
    """`cache.narrow(2, 0, end)`."""
    call = arguments(node, "self dim start length")
    axis = layout.axes[axis_of(call["dim"], len(layout.axes))]
    if axis != SLOT or integer(call["start"]) != 0:
        raise unreadable(node, f"selects part of the {axis} axis")
    return _until(node, layout, call["length"])


def unsqueeze(node: Node, layout: Layout) -> Layout:
    """`cache.unsqueeze(2)`."""
    at = axis_of(arguments(node, "self dim")["dim"], len(layout.axes) + 1)
    return layout.moved([*layout.axes[:at], NEW, *layout.axes[at:]])


def transpose(node: Node, layout: Layout) -> Layout:
    """`cache.transpose(1, 2)`, undone further on."""
    names = "self axis0 axis1" if op_name(node) == "swapaxes" else "self dim0 dim1"
    first, second = list(arguments(node, names).values())[1:]
    axes = list(layout.axes)
    i, j = axis_of(first, len(axes)), axis_of(second, len(axes))
    axes[i], axes[j] = axes[j], axes[i]
    return layout.moved(axes)


def permute(node: Node, layout: Layout) -> Layout:
    """`cache.permute(0, 2, 1, 3)`, undone further on."""
    dims = node.args[1:] or tuple(node.kwargs["dims"])
    if len(dims) == 1:
        dims = dims[0]
    return layout.moved([layout.axes[axis_of(dim, len(layout.axes))] for dim in dims])


def attribute(node: Node, layout: Layout) -> Layout:
    """`cache.mT`."""
    if node.args[1] != "mT":
        raise unreadable(node, f"takes its {node.args[1]}")
    return layout.moved([*layout.axes[:-2], layout.axes[-1], layout.axes[-2]])


def copy(node: Node, layout: Layout) -> Layout:
    """`contiguous()`, `clone()`, `to(...)`: the same values, if dtype and device stay."""
    before, after = tensor(node.args[0]), tensor(node)
    if before is None or after is None or before.dtype != after.dtype:
        raise unreadable(node, "changes the dtype")
    if before.device != after.device:
        raise unreadable(node, "changes the device")
    return layout


def _until(node: Node, layout: Layout, end: Node | int) -> Layout:
    count = integer(end)
    if layout.read_end is not None:
        raise unreadable(node, "slices a sequence that was already sliced")
    if count is None or not known(count >= 0):
        raise unreadable(node, "ends at a position that does not count from the front")
    return replace(layout, read_end=end)
