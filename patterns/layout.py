"""What the axes of a tensor read from a cache mean.

A read is followed from the cache [batch, head, slot, dim] forwards, one operation after the
other, each turning one layout into the next. Attention needs the same four axes at the end, with
the query heads that share a key/value head next to each other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.fx import Node

from .nodes import op_name, tensor
from .sites import Refused

BATCH, HEAD, SLOT, DIM = "batch", "head", "slot", "dim"
NEW, REPEAT = "new", "repeat"  # an axis of size one; the same axis after expand
CACHE_AXES = (BATCH, HEAD, SLOT, DIM)


@dataclass(frozen=True)
class Layout:
    """The meaning of each axis, and what has been done to heads and slots on the way."""

    axes: tuple[str, ...] = CACHE_AXES
    gqa: str = "none"
    repeats: int = 1
    read_end: Node | int | None = None

    def moved(self, axes: tuple[str, ...] | list[str]) -> Layout:
        """The same contents with other axes."""
        return replace(self, axes=tuple(axes))

    def repeated(self, gqa: str, repeats: int, node: Node) -> Layout:
        """Every head now stands `repeats` times in a row."""
        if self.gqa != "none":
            raise unreadable(node, "repeats heads that were already repeated")
        return replace(self, gqa=gqa, repeats=repeats, axes=CACHE_AXES)


def unreadable(node: Node, does: str, code: str = "read-view") -> Refused:
    """The refusal for an operation on the way that changes what attention would read."""
    return Refused(
        code,
        f"`{node.name}` ({op_name(node)}), between the cache and the attention, {does}; the pass "
        "replaces the read as a whole and cannot reproduce that. Read the cache through slices "
        "of the sequence, repeated heads and transposes that cancel out only.",
    )


def axis_of(dim: int, rank: int) -> int:
    """A non-negative axis number."""
    return dim % rank


def shapes(node: Node) -> tuple[tuple, tuple]:
    """The shapes before and after a one-input operation; empty if the graph does not say."""
    inner = node.args[0] if node.args else node.kwargs.get("input")
    before, after = tensor(inner), tensor(node)
    if before is None or after is None:
        return (), ()
    return tuple(before.shape), tuple(after.shape)
