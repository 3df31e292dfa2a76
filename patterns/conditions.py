"""What must hold between an attention and the caches it reads, one condition to a function."""

from __future__ import annotations

from torch.fx import Node

from .attention import Attention
from .nodes import known, recorded, same, tensor
from .sites import CacheWrite, Refused


def check_attention(attention: Attention) -> float | None:
    """Refuse attentions that compute more than softmax(q k^T scale + mask) v; return the scale."""
    if isinstance(attention.dropout, Node) or attention.dropout != 0:
        raise Refused(
            "dropout",
            f"dropout_p is {attention.dropout}, and only a literal 0.0 is known to drop nothing; "
            "attention over a compressed cache is for inference. Call model.eval().",
        )
    if attention.problem is not None:
        raise attention.problem
    scale = attention.scale
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float)):
        raise Refused(
            "scale",
            f"`scale` is {scale}, computed while the model runs, and is needed as a number when "
            "the kernel is built. Pass a Python float.",
        )
    return None if scale is None else float(scale)


def check_cache(cache: Node) -> None:
    """Refuse caches of another shape than [B, H, S, D]."""
    fake = tensor(cache)
    if fake is None or fake.dim() != 4:
        shape = "unknown" if fake is None else list(fake.shape)
        raise Refused(
            "cache-rank",
            f"The cache `{cache.name}` has shape {shape} where one layer's [B, H, S, D] is "
            "needed. Give each layer its own key and value tensors.",
        )


def check_distinct(key: Node, value: Node) -> None:
    """Refuse keys and values out of one tensor."""
    if key is value:
        raise Refused(
            "shared-cache",
            f"Keys and values are both read from `{key.name}`; the two are coded differently, "
            "so each needs a cache of its own.",
        )


def check_write(write: CacheWrite) -> None:
    """Refuse new tokens that are not simply rows of the cache."""
    cache, source = recorded(write.cache), recorded(write.source)
    if source.dtype != cache.dtype:
        raise Refused(
            "dtype",
            f"`{write.node.name}` writes {source.dtype} into a cache of {cache.dtype}, a rounding "
            "that a compressed cache would not repeat. Allocate the cache in the model's dtype.",
        )
    if not same(source.shape[0], cache.shape[0]):
        raise Refused(
            "batch",
            f"`{write.node.name}` writes {source.shape[0]} rows into a cache of "
            f"{cache.shape[0]}; every row must get its own new tokens. Allocate the cache for "
            "the batch that runs.",
        )
    if not same(source.shape[1], cache.shape[1]) or not same(source.shape[3], cache.shape[3]):
        raise Refused(
            "source-shape",
            f"`{write.node.name}` writes {list(source.shape)} into {list(cache.shape)}: heads "
            "or head dimension are broadcast. Expand the new tokens first.",
        )


def check_shapes(attention: Attention, key: CacheWrite, value: CacheWrite) -> None:
    """Refuse queries, keys and values that do not belong together one to one."""
    q, k, v = tensor(attention.query), recorded(key.cache), recorded(value.cache)
    new = recorded(key.source)
    if not same(k.shape[3], v.shape[3]):
        raise Refused(
            "head-dim",
            f"Keys have {k.shape[3]} dimensions and values {v.shape[3]}; the page layout stores "
            "both with one head dimension.",
        )
    # Two symbolic lengths are as a rule two symbols. Attention itself fails on unequal lengths,
    # so here only those known to differ are refused.
    lengths_differ = known(k.shape[2] != v.shape[2])
    heads_match = same(k.shape[0], v.shape[0]) and same(k.shape[1], v.shape[1])
    if lengths_differ or not heads_match or k.dtype != v.dtype:
        raise Refused(
            "caches-differ",
            f"The key cache is {list(k.shape)} {k.dtype} and the value cache {list(v.shape)} "
            f"{v.dtype}; a token's key and value are stored together, so they must match.",
        )
    if q is None or q.dim() != 4 or not same(attention.query_shape[0], k.shape[0]):
        shape = "unknown" if q is None else list(q.shape)
        raise Refused(
            "query-batch",
            f"Queries of shape {shape} meet a cache of {k.shape[0]} rows; every query row must "
            "have a cache row of its own, with no broadcasting.",
        )
    queries = attention.query_shape[2]
    if not same(queries, new.shape[2]):
        raise Refused(
            "query-length",
            f"{queries} queries attend while {new.shape[2]} tokens are written; each new "
            "token needs its query, and no other.",
        )
