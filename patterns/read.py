"""Following an attention's keys or values back to where they are stored."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from .layout import CACHE_AXES, Layout
from .nodes import first_argument, mutations, op_name, tensor
from .registry import READ_STEPS, attention
from .sites import Refused


@dataclass(frozen=True)
class Read:
    """The way from a tensor somewhere in the graph to an attention."""

    start: Node
    """The first node back from the attention that is more than a view or copy of another."""
    chain: tuple[Node, ...]
    """The nodes from the attention back to `start`, which it does not include."""
    returned_by: Node | None
    """The write whose return value is read, where the model does not name the cache itself."""

    @property
    def is_cache(self) -> bool:
        """Whether the way ends at an input of the graph."""
        return self.start.op == "placeholder"

    def layout(self, wanted: tuple[str, ...]) -> Layout:
        """What attention sees of the cache; refuses where its axes mean something else."""
        layout = Layout()
        for node in reversed(self.chain):
            layout = READ_STEPS[op_name(node)](node, layout)
        if layout.axes != wanted:
            raise Refused(
                "read-view",
                f"The attention reads the cache `{self.start.name}` with its axes in another "
                f"order ({', '.join(layout.axes)}) than [{', '.join(wanted)}]; the pass keeps "
                f"caches as [{', '.join(CACHE_AXES)}].",
            )
        return layout


def trace(node: Node) -> Read:
    """Walk back from an attention's key or value."""
    chain: list[Node] = []
    while op_name(node) in READ_STEPS:
        inner = first_argument(node)
        if inner is None or tensor(inner) is None:
            break
        chain.append(node)
        node = inner
    inner = first_argument(node)
    # Some models read what `index_copy_` returns: the cache itself, by another name.
    if op_name(node) == "index_copy_" and inner is not None and inner.op == "placeholder":
        return Read(inner, tuple(chain), node)
    return Read(node, tuple(chain), None)


def cache_behind(node: Node) -> Node | None:
    """A cache that reaches `node` through operations the walk does not follow.

    The search stays among tensors of four or more axes. Hidden states have three, so it never
    leaves this layer for an earlier one; and it stops at other attentions.
    """
    seen: set[Node] = set()
    pending = [node]
    while pending:
        node = pending.pop()
        fake = tensor(node)
        if node in seen or fake is None or fake.dim() < 4:
            continue
        seen.add(node)
        if node.op == "placeholder" and mutations(node):
            return node
        if attention(node) is None:
            pending += node.all_input_nodes
    return None
