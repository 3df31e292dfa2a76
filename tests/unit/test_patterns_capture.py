"""Getting Dynamo's graphs to match against, and what `match` owes every graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph

from skv_compile.patterns import Match, match

BATCH, KV_HEADS, SLOTS, DIM = SHAPE = 2, 2, 16, 8
Step = Callable[..., torch.Tensor]


class Cached(torch.nn.Module):
    """A module that owns two caches and leaves what to do with them to a function."""

    def __init__(
        self, step: Step, key_shape: tuple | None = None, value_shape: tuple | None = None
    ):
        super().__init__()
        shape = (BATCH, KV_HEADS, SLOTS, DIM)
        self.step = step
        self.register_buffer("keys", torch.zeros(key_shape or shape))
        self.register_buffer("values", torch.zeros(value_shape or shape))

    def forward(self, *args):
        return self.step(self.keys, self.values, *args)


def capture(model: Callable, *args, dynamic: bool | None = None, **kwargs) -> Graph:
    """The graph a torch.compile backend receives for one call of a model."""
    torch._dynamo.reset()
    graphs: list[Graph] = []

    def backend(gm: torch.fx.GraphModule, _inputs: list) -> Callable:
        graphs.append(gm.graph)
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(*args, **kwargs)
    (graph,) = graphs
    return graph


def tokens(count: int = 1, heads: int = KV_HEADS, batch: int = BATCH) -> torch.Tensor:
    """Random queries, keys or values."""
    return torch.randn(batch, heads, count, DIM)


def match_step(step: Step, *args, dynamic: bool | None = None, **shapes) -> Match:
    """Match what one step of a module with caches traces to."""
    return match(capture(Cached(step, **shapes), *args, dynamic=dynamic))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def write_and_attend(keys, values, q, k, v, position, mask):
    keys.index_copy_(2, position, k)
    values.index_copy_(2, position, v)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


def decode_arguments() -> tuple:
    mask = torch.ones(1, 1, 1, SLOTS, dtype=torch.bool)
    return tokens(), tokens(), tokens(), torch.tensor([3]), mask


def test_every_attention_is_counted_once_and_in_order() -> None:
    def step(keys, values, q, k, v, position, mask):
        x = F.scaled_dot_product_attention(q * 2, k * 2, v * 2)  # no cache
        x = write_and_attend(keys, values, x, k, v, position, mask)
        return F.scaled_dot_product_attention(x, torch.cat([k, k], 2) * 1, v.repeat(1, 1, 2, 1))

    found = match_step(step, *decode_arguments())
    assert [site.index for site in found.sites] == [1]
    assert len(found.plain) == 1
    assert [refusal.index for refusal in found.refusals] == [2]  # its v is an input of four axes


def test_the_graph_is_left_as_it_was() -> None:
    graph = capture(Cached(write_and_attend), *decode_arguments())
    before = str(graph)
    assert len(match(graph).sites) == 1
    assert str(graph) == before


def test_where_names_the_line_and_no_directory_of_this_machine() -> None:
    (site,) = match_step(write_and_attend, *decode_arguments()).sites
    line = write_and_attend.__code__.co_firstlineno + 3
    assert site.where == f"{__file__.rsplit('/', 1)[-1]}:{line} in write_and_attend"


def test_where_is_empty_without_a_stack_trace() -> None:
    graph = capture(Cached(write_and_attend), *decode_arguments())
    for node in graph.nodes:
        node.meta.pop("stack_trace", None)
    assert match(graph).sites[0].where == ""
