"""Which kernel a site will run on: what ``lowering.choice`` says of tensors without memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node

from .cache.state import LayerState
from .lowering.choice import Choice, choose
from .patterns import Mask, Site
from .rewrite import merged_mask


def forecast(sites: Sequence[Site], states: Sequence[LayerState]) -> list[Choice]:
    """Of every site the kernel for the forwards that it was traced for, and why.

    Symbolic sizes count as what they were when they were traced: no guard is added.
    """
    masks: dict[tuple[Mask, ...], Tensor | None] = {}  # layers share theirs
    found = []
    for site, state in zip(sites, states, strict=True):
        if site.masks not in masks:
            masks[site.masks] = _mask_of(site)
        found.append(_choice(site, state, masks[site.masks]))
    return found


def plain(sizes: Iterable[Any]) -> list[int]:
    """Sizes as numbers, symbols as what they were when they were traced."""
    return [size if isinstance(size, int) else int(size.node.hint or 1) for size in sizes]


def _choice(site: Site, state: LayerState, mask: Tensor | None) -> Choice:
    query, key = (node.meta["example_value"] for node in (site.query, site.key.source))
    shape = [query.shape[axis] for axis in site.query_order]
    with FakeTensorMode():
        q = torch.empty(plain(shape), dtype=query.dtype, device=query.device)
        k = torch.empty(plain(key.shape), dtype=key.dtype, device=key.device)
    heads = state.tensors.queries.shape[1]
    found = choose(state.layout, q, k, mask, heads, site.is_causal)
    if isinstance(shape[2], int):
        return found
    return found._replace(why=f"{found.why} (of {q.shape[2]} tokens; chosen anew for every length)")


def _mask_of(site: Site) -> Tensor | None:
    """The mask that the rewritten site is given, on no device."""
    if not site.masks:
        return None
    graph = Graph()
    values: dict[Node, Tensor] = {}
    for mask in site.masks:
        example = mask.node.meta["example_value"]
        values[mask.node] = torch.empty(plain(example.shape), dtype=example.dtype, device="meta")
    new = {node: graph.placeholder(f"mask_{n}") for n, node in enumerate(values)}
    graph.output(merged_mask(graph, site, new))
    return Interpreter(GraphModule({}, graph)).run(*values.values())
