"""Attention as `torch.nn.functional.scaled_dot_product_attention`."""

from __future__ import annotations

import torch
from torch.fx import Node

from .attention import Attention
from .nodes import arguments, tensor
from .sites import Mask

_SCHEMA = torch.ops.aten.scaled_dot_product_attention.default._schema
_NAMES = " ".join(argument.name for argument in _SCHEMA.arguments)
_DEFAULTS = {a.name: a.default_value for a in _SCHEMA.arguments if a.has_default_value()}


def recognise(node: Node) -> Attention | None:
    """The attention a node computes, None if it computes something else."""
    if node.op != "call_function":
        return None
    if node.target is not torch.nn.functional.scaled_dot_product_attention:
        return None
    call = arguments(node, _NAMES, **_DEFAULTS)
    mask = call["attn_mask"]
    masks: tuple[Mask, ...] = ()
    if mask is not None:
        fake = tensor(mask)
        masks = (Mask(mask, "keep" if fake is not None and fake.dtype == torch.bool else "add"),)
    return Attention(
        node=node,
        query=call["query"],
        key=call["key"],
        value=call["value"],
        masks=masks,
        dropout=call["dropout_p"],
        is_causal=call["is_causal"],
        scale=call["scale"],
        enable_gqa=call["enable_gqa"],
    )
