"""A past that grows by `torch.cat`: Hugging Face's DynamicCache."""

from __future__ import annotations

from torch.fx import Node

from .nodes import arguments, integer, op_name, tensor
from .read import Read, trace
from .sites import Refused


def check(key: Read, value: Read) -> None:
    """Refuse keys or values made of a past and the new tokens."""
    for read in (key, value):
        if _is_growing(read.start):
            raise Refused(
                "dynamic-cat",
                f"`{read.start.name}` concatenates the past with the new tokens (as a Hugging "
                "Face DynamicCache does): a new dense tensor every step, by construction, with "
                "no storage to compress. Pass a cache of static shape, such as "
                "skv.SphericalCache.",
            )


def _is_growing(node: Node) -> bool:
    if op_name(node) not in ("cat", "concat", "concatenate"):
        return False
    call = arguments(node, "tensors dim", dim=0)
    parts, fake = call["tensors"], tensor(node)
    if fake is None or fake.dim() != 4 or integer(call["dim"]) not in (2, -2):
        return False  # rotary embeddings concatenate too, along the head dimension
    past = parts[0]
    return trace(past).is_cache or _is_empty(past)


def _is_empty(node: Node) -> bool:
    """DynamicCache starts as `torch.tensor([])`."""
    fake = tensor(node)
    return fake is not None and fake.dim() == 1 and integer(fake.shape[0]) == 0
