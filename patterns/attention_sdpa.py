"""Attention as `torch.nn.functional.scaled_dot_product_attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .nodes import arguments

_SCHEMA = torch.ops.aten.scaled_dot_product_attention.default._schema
_NAMES = " ".join(argument.name for argument in _SCHEMA.arguments)
_DEFAULTS = {a.name: a.default_value for a in _SCHEMA.arguments if a.has_default_value()}


@dataclass(frozen=True)
class Attention:
    """An attention call with its arguments by name; the last four as the graph has them."""

    node: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None
    dropout: Any
    is_causal: Any
    scale: Any
    enable_gqa: Any


def recognise(node: Node) -> Attention | None:
    """The attention a node computes, None if it computes something else."""
    if node.op != "call_function":
        return None
    if node.target is not torch.nn.functional.scaled_dot_product_attention:
        return None
    call = arguments(node, _NAMES, **_DEFAULTS)
    return Attention(
        node=node,
        query=call["query"],
        key=call["key"],
        value=call["value"],
        mask=call["attn_mask"],
        dropout=call["dropout_p"],
        is_causal=call["is_causal"],
        scale=call["scale"],
        enable_gqa=call["enable_gqa"],
    )
