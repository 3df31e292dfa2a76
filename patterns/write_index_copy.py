"""`cache.index_copy_(2, position, new)`: Hugging Face's StaticCache."""

from __future__ import annotations

from torch.fx import Node

from .nodes import arguments, integer, op_name
from .sites import CacheWrite
from .slots import is_slot_index


def recognise(node: Node) -> CacheWrite | None:
    """The write a node performs, None if it is not this spelling."""
    if op_name(node) != "index_copy_":
        return None
    call = arguments(node, "self dim index source")
    cache, index, source = call["self"], call["index"], call["source"]
    if cache.op != "placeholder" or integer(call["dim"]) not in (2, -2):
        return None
    if not is_slot_index(index, source):
        return None
    return CacheWrite("index_copy", node, (node,), cache, source, index, position_is_start=False)
