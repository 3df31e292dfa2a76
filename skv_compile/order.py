"""Order in a graph after autograd: a cache is written after it was read.

Functionalised, ``skv::append`` and ``skv::retain`` make new tensors of a cache, and Inductor may
move them before the ``skv::attend`` that reads the old one. Then it must copy the cache, where
otherwise it writes in place.
"""

from __future__ import annotations

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.fx import Graph, Node

from .lowering import ops

WRITES = (ops.append, ops.retain, ops.retain_many, ops.calibrate)


def write_last(graph: Graph) -> None:
    """Move writes of a cache behind the last node that reads what they replace."""
    place = {node: n for n, node in enumerate(graph.nodes)}
    writes = [node for node in graph.nodes if _is_write(node)]
    moved = False
    for write in writes:
        readers = [
            user
            for base in write.kwargs["_all_bases"]
            for user in base.users
            if not _is_write(user) and user.target is not torch.ops.aten.copy_.default
        ]
        last = max(readers, key=place.__getitem__, default=write)
        if place[last] > place[write]:
            last.append(write)
            place[write] = place[last]
            moved = True
    if moved:
        stable_topological_sort(graph)


def _is_write(node: Node) -> bool:
    return node.target is auto_functionalized_v2 and node.args[0] in WRITES
