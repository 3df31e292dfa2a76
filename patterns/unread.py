"""Caches that are written, and read by nothing that is known to be an attention."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch.fx import Graph, Node

from .attention import Attention
from .nodes import op_name, tensor
from .read import cache_behind, trace
from .registry import cache_write
from .sites import Refusal
from .where import where


def refusals(graph: Graph, attentions: Iterable[Attention]) -> Iterator[Refusal]:
    """One for every written tensor that looks like a cache and no attention reads."""
    attentions = tuple(attentions)
    read: set[Node | None] = set()
    for attention in attentions:
        for node in (attention.key, attention.value):
            start = trace(node).start
            read |= {start, cache_behind(start)}
    for node in graph.nodes:
        write = cache_write(node)
        if write is None or write.cache.op != "placeholder" or write.cache in read:
            continue
        fake, new = tensor(write.cache), tensor(write.source)
        if fake is None or new is None or fake.dim() != 4 or new.dim() != 4:
            continue
        read.add(write.cache)
        seen = [user for user in write.cache.users if user is not node and user not in write.erase]
        if not seen:
            continue
        by = ", ".join(f"`{user.name}` ({op_name(user)})" for user in seen)
        yield Refusal(
            len(attentions),
            node,
            "no-attention",
            f"`{write.cache.name}` is written like a cache and read by {by}, from where no "
            "attention is found that the pass knows: scaled_dot_product_attention, or matmul or "
            "einsum with a softmax between, of four axes each.",
            where(node),
        )
