"""Every spelling the matcher knows, in the order it tries them.

To teach it a new one, write a file beside the others and add one line here.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from . import (
    attention_flex,
    attention_manual,
    attention_sdpa,
    gqa_expand_reshape,
    gqa_repeat_interleave,
    read_views,
    write_index_copy,
    write_indexed_assignment,
    write_slice_copy,
)
from .attention import Attention
from .layout import Layout
from .sites import CacheWrite

ATTENTIONS: tuple[Callable[[Node], Attention | None], ...] = (
    attention_sdpa.recognise,
    attention_manual.recognise,
    attention_flex.recognise,
)

CACHE_WRITES: tuple[Callable[[Node], CacheWrite | None], ...] = (
    write_index_copy.recognise,
    write_indexed_assignment.recognise,
    write_slice_copy.recognise,
)

READ_STEPS: dict[str, Callable[[Node, Layout], Layout]] = {
    "getitem": read_views.index,
    "narrow": read_views.narrow,
    "unsqueeze": read_views.unsqueeze,
    "transpose": read_views.transpose,
    "swapaxes": read_views.transpose,
    "permute": read_views.permute,
    "getattr": read_views.attribute,
    "contiguous": read_views.copy,
    "clone": read_views.copy,
    "detach": read_views.copy,
    "to": read_views.copy,
    "type": read_views.copy,
    "type_as": read_views.copy,
    "float": read_views.copy,
    "half": read_views.copy,
    "bfloat16": read_views.copy,
    "expand": gqa_expand_reshape.expand,
    "reshape": gqa_expand_reshape.merge,
    "view": gqa_expand_reshape.merge,
    "flatten": gqa_expand_reshape.merge,
    "repeat_interleave": gqa_repeat_interleave.repeat_interleave,
    "repeat": gqa_repeat_interleave.repeat,
    "tile": gqa_repeat_interleave.repeat,
}


def attention(node: Node) -> Attention | None:
    """The attention a node computes, in whichever spelling."""
    return next((found for spelling in ATTENTIONS if (found := spelling(node))), None)


def cache_write(node: Node) -> CacheWrite | None:
    """The cache write a node performs, in whichever spelling."""
    return next((found for spelling in CACHE_WRITES if (found := spelling(node))), None)
