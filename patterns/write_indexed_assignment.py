"""`cache[:, :, position] = new` with an index tensor: gpt-fast."""

from __future__ import annotations

from torch.fx import Node

from .nodes import op_name
from .sites import CacheWrite
from .slots import is_slot_index, slot_entry


def recognise(node: Node) -> CacheWrite | None:
    """The write a node performs, None if it is not this spelling."""
    if op_name(node) != "setitem":
        return None
    cache, index, source = node.args
    if not isinstance(cache, Node) or not isinstance(source, Node) or cache.op != "placeholder":
        return None
    position = slot_entry(index, cache)
    if not isinstance(position, Node) or not is_slot_index(position, source):
        return None
    return CacheWrite(
        "indexed_assignment", node, (node,), cache, source, position, position_is_start=False
    )
