"""The one write that a cache which is read must have."""

from __future__ import annotations

from torch.fx import Node

from .attention import Attention
from .nodes import base, integer, mutates, mutations, op_name, same, tensor
from .read import Read
from .registry import cache_write
from .sites import CacheWrite, Refused

Order = dict[Node, int]

# Reading these does not read the cache's contents.
# fmt: off
_METADATA = frozenset({
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size",
    "is_contiguous", "is_floating_point", "is_complex", "sym_size", "sym_stride", "sym_numel",
})
_ATTRIBUTES = frozenset({
    "shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "requires_grad",
})
# fmt: on


def find(read: Read, attention: Node, order: Order) -> CacheWrite:
    """The write that fills the cache before an attention reads it."""
    cache = read.start
    writes = mutations(cache)
    if not writes:
        raise Refused(
            "cache-not-written",
            f"Nothing in this graph writes to `{cache.name}`, so the new keys and values that "
            "should go to a compressed cache are nowhere to be seen. Compile the code that "
            "updates the cache together with the attention.",
        )
    if len(writes) > 1:
        raise Refused(
            "written-twice",
            f"`{cache.name}` is written {len(writes)} times ({_names(writes)}); the pass appends "
            "once for each attention. Write all new tokens at once.",
        )
    write = cache_write(writes[0])
    if write is None:
        raise Refused(
            "unsupported-write",
            f"`{writes[0].name}` writes to `{cache.name}` in a way that is none of: "
            "cache.index_copy_(2, position, new), cache[:, :, position] = new, "
            "cache[:, :, a:b] = new, cache[:, :, a:b].copy_(new); each with new tokens "
            "[B, H, T, D] and one slot for each.",
        )
    reads = (attention, *read.chain)
    if any(order[node] < order[write.node] for node in reads):
        raise Refused(
            "written-after-read",
            f"The attention reads `{cache.name}` before `{write.node.name}` writes to it, so it "
            "does not see the new tokens, and a compressed cache would show them. Update the "
            "cache first.",
        )
    return write


def check_positions(key: CacheWrite, value: CacheWrite, attention: Node, order: Order) -> None:
    """Refuse keys and values that go to different slots."""
    one, other = key.position, value.position
    if key.position_is_start != value.position_is_start or not (
        one is other or (key.position_is_start and same(integer(one), integer(other)))
    ):
        raise Refused(
            "positions-differ",
            f"Keys are written at {one} and values at {other}; a compressed cache stores a "
            "token's key and value together, so both must use the same index tensor or start.",
        )
    first = min(order[key.node], order[value.node])
    for user in one.users if isinstance(one, Node) and tensor(one) is not None else ():
        if mutates(user, one) and first < order[user] < order[attention]:
            raise Refused(
                "positions-differ",
                f"`{user.name}` changes the positions `{one}` in place between the cache writes "
                "and the attention. Change them afterwards.",
            )


def check_unchanged(attention: Attention, key: CacheWrite, value: CacheWrite, order: Order) -> None:
    """Refuse tensors that change after the model used them: the pass uses them at the end."""
    used = [(write.source, write.node) for write in (key, value)]
    used.append((attention.query, attention.key_reader))
    for mask in attention.masks:
        own = [user for user in mask.node.users if user in attention.inner]
        used.append((mask.node, min(own, key=order.__getitem__, default=attention.node)))
    for node, user in used:
        for write in mutations(base(node)):
            if order[user] < order[write] < order[attention.node]:
                raise Refused(
                    "changed",
                    f"`{write.name}` changes `{node.name}` in place after `{user.name}` used it "
                    "and before the attention is finished. Change it afterwards.",
                )


def check_escapes(read: Read, write: CacheWrite, attention: Attention) -> None:
    """Refuse a cache whose contents anything but this attention gets to see."""
    allowed = {*read.chain, *write.erase, attention.node, attention.key_reader}
    for node in (write.cache, *read.chain, *write.erase):
        for user in node.users:
            if user in allowed or (node is write.cache and _is_metadata(user)):
                continue
            does = "is returned from the graph" if user.op == "output" else "is also used by"
            by = "" if user.op == "output" else f" `{user.name}` ({op_name(user)})"
            what = f"`{write.cache.name}`" if node is write.cache else f"its view `{node.name}`"
            raise Refused(
                "cache-escapes",
                f"The cache {what} {does}{by}; once compressed there are no dense keys and "
                "values to hand out. Let this attention be the only reader.",
            )


def _is_metadata(node: Node) -> bool:
    if op_name(node) == "getattr":
        return node.args[1] in _ATTRIBUTES
    return op_name(node) in _METADATA


def _names(nodes: list[Node]) -> str:
    return ", ".join(f"`{node.name}`" for node in nodes)
