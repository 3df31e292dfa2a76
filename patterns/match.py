"""From a graph to its attention sites. Reads the graph and never changes it."""

from __future__ import annotations

from torch.fx import Graph, Node

from . import conditions, masks, past_cat, past_sliding, unread, written
from .attention import Attention
from .gqa_enable import group
from .layout import Layout, unreadable
from .nodes import integer as as_integer
from .nodes import mutations, recorded, same, tensor
from .read import Read, cache_behind, trace
from .registry import attention as recognise
from .sites import Match, Refusal, Refused, Site
from .where import where


def match(graph: Graph) -> Match:
    """Sort every attention of a Dynamo graph into sites, refusals and plain ones.

    The conditions are checked in a fixed order and the first that fails names the refusal:

    the past       sliding, dynamic-cat, read-view, not-both-cached, cache-rank, shared-cache
    the writes     cache-not-written, written-twice, unsupported-write, written-after-read,
                   positions-differ, changed, cache-escapes
    the call       dropout, flex, weights, scores, mask-value, mask-scaled, mask-dtype, scale
    the shapes     dtype, batch, source-shape, head-dim, caches-differ, query-batch, query-length
    the read       read-view, batch, gqa, read-ends-differ
    the mask       causal-symbolic, mask-shape, causal-alignment, no-mask, not-causal,
                   read-end

    A cache that is written and read by no attention is refused last: no-attention.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    whole = past_sliding.overwritten(graph)
    sites: list[Site] = []
    refusals: list[Refusal] = []
    plain: list[Node] = []
    attentions = [found for node in graph.nodes if (found := recognise(node))]
    for index, attention in enumerate(attentions):
        node = attention.node
        try:
            site = _site(index, attention, order, whole)
        except Refused as refused:
            refusals.append(Refusal(index, node, refused.code, refused.reason, where(node)))
        else:
            if site is None:
                plain.append(node)
            else:
                sites.append(site)
    refusals += unread.refusals(graph, attentions)
    return Match(tuple(sites), tuple(refusals), tuple(plain))


def _site(
    index: int, attention: Attention, order: written.Order, whole: past_sliding.Overwritten
) -> Site | None:
    """The site of an attention, None if it has no cache; raises Refused."""
    key_read, value_read = trace(attention.key), trace(attention.value)
    past_sliding.check(attention, key_read, value_read, whole)
    past_cat.check(key_read, value_read)
    if not _are_caches(key_read, value_read):
        return None
    for read in (key_read, value_read):
        conditions.check_cache(read.start)
    conditions.check_distinct(key_read.start, value_read.start)

    key = written.find(key_read, attention.key_reader, order)
    value = written.find(value_read, attention.node, order)
    written.check_positions(key, value, attention.node, order)
    written.check_unchanged(attention, key, value, order)
    written.check_escapes(key_read, key, attention)
    written.check_escapes(value_read, value, attention)

    scale = conditions.check_attention(attention)
    conditions.check_write(key)
    conditions.check_write(value)
    conditions.check_shapes(attention, key, value)

    key_layout = key_read.layout(attention.key_axes)
    value_layout = value_read.layout(attention.value_axes)
    gqa, group_size = _group(attention, key.cache, key_layout, value_layout)
    read_end = _read_end(key_layout, value_layout)
    masks.check(attention, key, read_end)

    return Site(
        index=index,
        attention=attention.node,
        inner=attention.inner,
        query=attention.query,
        query_order=attention.query_order,
        output_order=attention.output_order,
        spelling=attention.spelling,
        key=key,
        value=value,
        views=key_read.chain + value_read.chain,
        masks=attention.masks,
        is_causal=attention.is_causal,
        scale=scale,
        group_size=group_size,
        gqa=gqa,
        read_end=read_end,
        where=where(attention.node),
    )


def _are_caches(key: Read, value: Read) -> bool:
    """True if keys and values are both cached, False if neither is."""
    for read in (key, value):
        if not read.is_cache and cache_behind(read.start) is not None:
            raise unreadable(read.start, "is not a view of the cache")
    cached = [_is_cache(read) for read in (key, value)]
    if any(cached) and not all(cached):
        names = ("keys", "values") if cached[0] else ("values", "keys")
        raise Refused(
            "not-both-cached",
            f"The {names[0]} are read from a cache and the {names[1]} are not; a compressed "
            "cache stores a token's key and value together.",
        )
    return all(cached)


def _is_cache(read: Read) -> bool:
    """An input that is written to, or that at least has the shape of a cache."""
    fake = tensor(read.start)
    return read.is_cache and (bool(mutations(read.start)) or (fake is not None and fake.dim() == 4))


def _group(attention: Attention, cache: Node, key: Layout, value: Layout) -> tuple[str, int]:
    if (key.gqa, key.repeats) != (value.gqa, value.repeats):
        raise Refused(
            "gqa",
            f"Key heads are repeated {key.repeats} times ({key.gqa}) and value heads "
            f"{value.repeats} times ({value.gqa}); a query head must use one cached head for both.",
        )
    heads, cached = attention.query_shape[1], recorded(cache).shape[1]
    return group(heads, cached, key.gqa, key.repeats, attention.enable_gqa)


def _read_end(key: Layout, value: Layout) -> Node | int | None:
    one, other = key.read_end, value.read_end
    if one is other or same(as_integer(one), as_integer(other)):
        return one
    raise Refused(
        "read-ends-differ",
        f"Keys are read up to {one} and values up to {other}; both must be read alike.",
    )
