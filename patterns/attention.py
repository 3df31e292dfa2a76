"""An attention call, in whichever spelling, with its arguments by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from .layout import CACHE_AXES
from .nodes import Int, recorded
from .sites import Mask, Refused

IN_ORDER = (0, 1, 2, 3)


@dataclass(frozen=True)
class Attention:
    """softmax(q k^T scale + masks) v; dropout, is_causal, scale, enable_gqa as the graph has
    them."""

    node: Node
    query: Node
    key: Node
    value: Node
    masks: tuple[Mask, ...]
    dropout: Any = 0.0
    is_causal: Any = False
    scale: Any = None
    enable_gqa: Any = False
    spelling: str = "sdpa"
    inner: tuple[Node, ...] = ()
    """The nodes from the product of queries and keys to the weights, users first; not `node`."""
    key_axes: tuple[str, ...] = CACHE_AXES
    """What the axes of `key` must mean; a product of matrices wants keys transposed."""
    value_axes: tuple[str, ...] = CACHE_AXES
    query_order: tuple[int, ...] = IN_ORDER
    """The axes of `query` that are batch, head, token and dimension."""
    output_order: tuple[int, ...] = IN_ORDER
    """Which of batch, head, token and dimension the axes of `node` are."""
    problem: Refused | None = None
    """What it computes besides, which no cache could give."""

    @property
    def key_reader(self) -> Node:
        """The node that reads the keys; `node` itself reads the values."""
        return self.inner[-1] if self.inner else self.node

    @property
    def query_shape(self) -> tuple[Int, ...]:
        """[B, H, T, D], for queries of four axes."""
        shape = recorded(self.query).shape
        return tuple(shape[axis] for axis in self.query_order)

    @property
    def slots(self) -> Int:
        """How many slots are read."""
        return recorded(self.key).shape[self.key_axes.index(CACHE_AXES[2])]
