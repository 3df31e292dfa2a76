"""What a mask says about the slots an attention may see."""

from __future__ import annotations

from torch.fx import Node

from .attention import Attention
from .nodes import Int, integer, known, op_name, recorded, same, tensor
from .sites import CacheWrite, Refused


def has_window(mask: Node, window: Int) -> bool:
    """True if a mask is built from `slot > query - window`.

    A mask that comes into the graph ready-made keeps its secret.
    """
    seen: set[Node] = set()
    pending = [mask]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        pending += node.all_input_nodes
        if op_name(node) in ("gt", "ge") and len(node.args) == 2:
            bound = node.args[1]
            if isinstance(bound, Node) and op_name(bound) == "sub" and len(bound.args) == 2:
                width = integer(bound.args[1])
                if width is not None and same(width, window):
                    return True
    return False


def check(attention: Attention, key: CacheWrite, read_end: Node | int | None) -> None:
    """Refuse attentions that would see slots nothing was written to, or the wrong ones."""
    tokens, slots = recorded(key.source).shape[2], attention.slots
    if not isinstance(attention.is_causal, bool):
        raise Refused(
            "causal-symbolic",
            "`is_causal` is not a literal True or False, so what the attention may see is not "
            "known when it is compiled.",
        )
    if attention.masks:
        for mask in attention.masks:
            _check_shape(mask.node, slots)
    elif attention.is_causal:
        _check_alignment(key, tokens, read_end)
    elif read_end is None:
        raise Refused(
            "no-mask",
            "The attention has no mask, is not causal, and reads the whole cache, slots included "
            "that no token was written to. Pass a mask, or read `cache[:, :, :end]`.",
        )
    elif not same(tokens, 1):
        raise Refused(
            "not-causal",
            f"{tokens} new tokens attend to a sliced cache with no mask and is_causal=False, so "
            "each sees the ones after it, which a cache that is appended to cannot offer. Pass "
            "a causal mask.",
        )
    else:
        _check_end(key, read_end)


def _check_shape(mask: Node, slots: Int) -> None:
    fake = tensor(mask)
    if fake is None or not 1 <= fake.dim() <= 4 or not same(fake.shape[-1], slots):
        raise Refused(
            "mask-shape",
            f"The mask `{mask.name}` does not have one entry for each of the {slots} slots read, "
            "so it cannot be followed slot by slot. Expand it to [..., T, S].",
        )


def _check_alignment(key: CacheWrite, tokens: Int, read_end: Node | int | None) -> None:
    """SDPA aligns `is_causal` to the top left: query i sees slots 0..i, wherever it was written.

    That is what a model means when it fills an empty cache, and only then.
    """
    if same(tokens, 1):
        raise Refused(
            "causal-alignment",
            "is_causal=True with a single query lets it see the first slot only. Pass a mask, or "
            "is_causal=False and a read of `cache[:, :, :end]`.",
        )
    start = integer(key.position) if key.position_is_start else None
    elsewhere = start is not None and known(start != 0)
    if elsewhere or (read_end is not None and not same(integer(read_end), tokens)):
        raise Refused(
            "causal-alignment",
            "is_causal=True lets query i see slots 0 to i, and the new tokens are not those "
            "slots, so they would not see themselves. Pass a mask.",
        )


def _check_end(key: CacheWrite, read_end: Node | int) -> None:
    """A read without a mask must end with the new token, where the graph tells where that is."""
    start, end = integer(key.position), integer(read_end)
    if key.position_is_start and not (start is not None and same(end, start + 1)):
        raise Refused(
            "read-end",
            f"The new token is written at {key.position} and the read ends at {read_end}, not "
            "just behind it: it leaves out stored tokens or takes in empty slots.",
        )
