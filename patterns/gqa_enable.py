"""Repeated heads as `scaled_dot_product_attention(..., enable_gqa=True)`, and the count of them."""

from __future__ import annotations

from typing import Any

from .nodes import Int, constant
from .sites import Refused


def group(
    query_heads: Int, cache_heads: Int, spelling: str, repeats: int, enable_gqa: Any
) -> tuple[str, int]:
    """How the model groups its heads, and how many query heads share a key/value head."""
    queries, cached = constant(query_heads), constant(cache_heads)
    if queries is None or cached is None:
        raise Refused(
            "gqa",
            f"The number of heads is symbolic ({query_heads} over {cache_heads}), so groups "
            "cannot be formed. Take it from the model's config, not from an input.",
        )
    if queries % cached:
        raise Refused(
            "gqa",
            f"{queries} query heads do not divide into {cached} key/value heads, so no "
            "query head has one key/value head of its own group.",
        )
    size = queries // cached
    if size == repeats:
        return spelling, size
    if enable_gqa is True and spelling == "none":
        return "enable_gqa", size
    if cached == 1 and spelling == "none":  # one head for all: nothing to guess
        return "broadcast", size
    raise Refused(
        "gqa",
        f"{queries} query heads attend to {cached} cached heads repeated {repeats} "
        f"times, where {size} are needed: the rest is left to broadcasting, whose grouping the "
        "pass does not guess. Pass enable_gqa=True to the attention.",
    )
