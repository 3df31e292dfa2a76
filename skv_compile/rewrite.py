"""A Dynamo graph with attention sites -> the same graph on compressed state.

Each site becomes ``skv::attend``, ``skv::retain`` and ``skv::append``; the placeholders of its
dense cache give way to the tensors of its state.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.source import AttrSource
from torch._guards import TracingContext
from torch.fx import Graph, GraphModule, Node

from .cache.state import LayerState
from .lowering import ops
from .lowering.state import State
from .patterns import Match, Site

_IN_ORDER = (0, 1, 2, 3)


@dataclass(frozen=True)
class Rewritten:
    """A rewritten graph and how to feed it.

    ``kept`` are the positions of the original inputs that are still inputs; the tensors of
    ``sites`` states follow them, in order.
    """

    module: GraphModule
    example_inputs: list[Any]
    kept: tuple[int, ...]


def clone(module: GraphModule) -> tuple[GraphModule, dict[Node, Node]]:
    """A copy that may be changed, and old node -> new node.

    Dynamo reads its own graph again after a backend returns, so that one must stay as it is.
    """
    graph = Graph()
    mapping: dict[Node, Node] = {}
    output = graph.graph_copy(module.graph, mapping)
    old_output = next(iter(reversed(module.graph.nodes)))
    graph.output(output).meta.update(old_output.meta)
    for old, new in mapping.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    copied = GraphModule(module, graph)
    copied.meta = dict(module.meta)
    for name in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(module, name):
            setattr(copied, name, getattr(module, name))
    return copied, mapping


def rewrite(
    module: GraphModule, match: Match, states: Sequence[LayerState], inputs: Sequence[Any]
) -> Rewritten:
    """Rewrite the sites of a graph.

    Args:
        module: as Dynamo made it; it is not changed.
        match: its sites.
        states: one for each site.
        inputs: the example inputs of ``module``, in placeholder order.
    """
    copied, new = clone(module)
    graph = copied.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    anchor = placeholders[-1]
    fakes: list[Any] = []
    for site, state in zip(match.sites, states, strict=True):
        nodes = []
        for field, tensor in zip(State._fields, state.tensors, strict=True):
            fake = _fake(tensor)
            with graph.inserting_after(anchor):
                node = graph.placeholder(f"skv_{site.index}_{field}")
            node.meta["example_value"] = fake
            # A fixed address across calls, which CUDA graphs may rely on.
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
            node._dynamo_source = _source(new[site.key.cache], field)
            nodes.append(node)
            fakes.append(fake)
            anchor = node
        _replace(graph, site, new, nodes, state, len(fakes) // len(State._fields) - 1)
    _plain_slots(graph, match, new)
    kept = []
    caches = {new[write.cache] for site in match.sites for write in (site.key, site.value)}
    for n, node in enumerate(placeholders):
        if node in caches and not node.users:
            graph.erase_node(node)
        else:
            kept.append(n)
    graph.lint()
    copied.recompile()
    return Rewritten(copied, [inputs[n] for n in kept] + fakes, tuple(kept))


def _source(cache: Node, field: str) -> AttrSource:
    """Where Dynamo would find a state tensor: an attribute of the phantom."""
    source = cache._dynamo_source
    return AttrSource(AttrSource(AttrSource(source, "_skv_state"), "tensors"), field)


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    """A fake of its own for a state tensor: layers may share constants, graph inputs must not."""
    mode = TracingContext.get().fake_mode
    assert mode is not None
    with mode:
        return torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )


def _replace(
    graph: Graph,
    site: Site,
    new: dict[Node, Node],
    nodes: list[Node],
    state: LayerState,
    number: int,
) -> None:
    attention = new[site.attention]
    query = new[site.query]
    key, value = new[site.key.source], new[site.value.source]
    layout = state.layout
    scale = layout.head_dim**-0.5 if site.scale is None else site.scale
    with graph.inserting_before(attention):
        mask = merged_mask(graph, site, new)
        if site.query_order != _IN_ORDER:
            query = graph.call_method("permute", (query, site.query_order))
        position = _position(graph, site, new, key)
        attend = graph.call_function(
            ops.attend,
            (
                query,
                key,
                value,
                mask,
                position,
                *nodes,
                site.is_causal,
                scale,
                layout.key,
            ),
        )
        tokens = site.query.meta["example_value"].shape[site.query_order[2]]
        if layout.calibrate and not (isinstance(tokens, int) and tokens < layout.calibrate):
            turn_and_frames = nodes[State._fields.index("turn") :]
            graph.call_function(
                ops.calibrate,
                (query, key, value, mask, position, *turn_and_frames, layout.key),
            )
        exact = nodes[:4]
        if not isinstance(tokens, int) or tokens > 1:
            graph.call_function(
                ops.retain_many,
                (query, key, value, mask, position, *nodes, scale, number),
            )
        elif layout.observed:
            graph.call_function(ops.retain, (query, position, *exact[2:], layout.key))
        graph.call_function(ops.append, (key, value, mask, position, *exact, layout.key))
        result = attend
        if site.output_order != _IN_ORDER:
            result = graph.call_method("permute", (attend, site.output_order))
    for node in {attend, result}:
        node.meta = {k: v for k, v in attention.meta.items() if k != "val"}
    attention.replace_all_uses_with(result)
    for node in (attention, *(new[n] for n in (*site.inner, *site.views))):
        graph.erase_node(node)
    for write in (site.key, site.value):
        for node in write.erase:
            graph.erase_node(new[node])


def merged_mask(graph: Graph, site: Site, new: dict[Node, Node]) -> Node | None:
    """The site's masks as one of four axes: bool, True where a slot is seen, or additive."""
    if not site.masks:
        return None
    seen, added = None, None
    for mask in site.masks:
        node = new[mask.node]
        if mask.form == "add":
            added = node if added is None else graph.call_function(operator.add, (added, node))
            continue
        if mask.form == "hide":
            node = graph.call_function(torch.logical_not, (node,))
        seen = node if seen is None else graph.call_function(operator.and_, (seen, node))
    merged = added if seen is None else seen
    if seen is not None and added is not None:
        merged = graph.call_function(torch.where, (seen, added, -torch.inf))
    missing = 4 - max(mask.node.meta["example_value"].dim() for mask in site.masks)
    if missing > 0:
        index = (*((None,) * missing), Ellipsis)
        merged = graph.call_function(operator.getitem, (merged, index))
    return merged


def _position(graph: Graph, site: Site, new: dict[Node, Node], key: Node) -> Node:
    """The slots [T] that the site writes."""
    start = site.key.position
    if not site.key.position_is_start:
        assert isinstance(start, Node)
        return new[start]
    device = site.key.source.meta["example_value"].device
    tokens = graph.call_method("size", (key, 2))
    count = graph.call_function(torch.arange, (tokens,), {"device": device})
    begin = new[start] if isinstance(start, Node) else start
    return graph.call_function(operator.add, (count, begin))


def _plain_slots(graph: Graph, match: Match, new: dict[Node, Node]) -> None:
    """Let the positions of rewritten sites be plain arithmetic."""
    for site in match.sites:
        for write in (site.key, site.value):
            node = new[write.position] if isinstance(write.position, Node) else None
            if node is None or node.target is not ops.slots:
                continue
            start, tokens = node.args
            with graph.inserting_before(node):
                device = write.source.meta["example_value"].device
                count = graph.call_function(torch.arange, (tokens,), {"device": device})
                plain = graph.call_function(operator.add, (count, start))
            plain.meta = dict(node.meta)
            node.replace_all_uses_with(plain)
            node.target, node.args = operator.add, ()  # seen twice: keys and values share it
            graph.erase_node(node)
            new[write.position] = plain
