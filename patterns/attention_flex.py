"""Attention as `torch.nn.attention.flex_attention`, which is recognised to be refused."""

from __future__ import annotations

from torch.fx import Node

from .attention import Attention
from .nodes import arguments
from .sites import Refused

_NAMES = "query key value score_mod block_mask scale"


def recognise(node: Node) -> Attention | None:
    """The attention a node computes, None if it computes something else."""
    if node.op != "call_function" or getattr(node.target, "_name", "") != "flex_attention":
        return None
    call = arguments(node, _NAMES, scale=None)
    return Attention(
        node=node,
        query=call["query"],
        key=call["key"],
        value=call["value"],
        masks=(),
        scale=call["scale"],
        enable_gqa=True,
        spelling="flex",
        problem=Refused(
            "flex",
            f"`{node.name}` is flex_attention, whose score_mod and mask_mod may be any program. "
            "Use scaled_dot_product_attention (in transformers: attn_implementation='sdpa').",
        ),
    )
