"""A cache that keeps the last tokens only: Hugging Face's StaticSlidingWindowLayer.

It is bounded already and stays dense. It writes in four ways, and which one is in the graph
depends on how full it was when the graph was traced, so all four have to be told from a cache of
full length, or half of a generation would go to one storage and half to another:

- not full: `index_copy_` and a read of the whole cache, as a full layer does; only the mask
  tells, by a window exactly as long as the cache;
- full, one new token: `roll`, write the last slot, `copy_` over the whole cache;
- (nearly) full, several new tokens: `cat` the past and the new, `copy_` the end of it over the
  whole cache, attend to the cat;
- empty, more new tokens than it holds: `copy_` the end of them over the whole cache, attend to
  the new tokens directly. There the attention itself has no cache at all.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from .attention import Attention
from .masks import has_window
from .nodes import first_argument, op_name, tensor
from .read import Read, trace
from .sites import Refused

Overwritten = dict[Node, Node]


def overwritten(graph: Graph) -> Overwritten:
    """Caches that are written whole, by `copy_`, and what they are written from.

    Maps the cache, and the tensor that the copied one is a view of, to the cache.
    """
    found: Overwritten = {}
    for node in graph.nodes:
        cache = first_argument(node)
        if op_name(node) != "copy_" or cache is None or cache.op != "placeholder":
            continue
        written, fake = node.args[1], tensor(cache)
        if not isinstance(written, Node) or fake is None or fake.dim() != 4:
            continue
        source = trace(written)
        rolled = op_name(source.start) == "roll" and first_argument(source.start) is cache
        sliced = any(op_name(view) == "getitem" for view in source.chain)
        if rolled or sliced:
            found[cache] = found[source.start] = cache
    return found


def check(attention: Attention, key: Read, value: Read, whole: Overwritten) -> None:
    """Refuse an attention whose keys or values are in a sliding window."""
    for read in (key, value):
        cache = whole.get(read.start)
        if cache is not None:
            raise _refused(cache, "is overwritten as a whole to keep its last tokens")
        fake = tensor(read.start)
        if not read.is_cache or fake is None or fake.dim() != 4:
            continue
        slots = fake.shape[2]
        if any(has_window(mask.node, slots) for mask in attention.masks):
            raise _refused(read.start, f"has {slots} slots and its mask is a window of {slots}")


def _refused(cache: Node, what: str) -> Refused:
    return Refused(
        "sliding",
        f"The cache `{cache.name}` {what}: a sliding window. Its size is bounded already, so it "
        "is left dense.",
    )
