"""What the matcher finds: plain data, all of it immutable."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node


@dataclass(frozen=True)
class CacheWrite:
    """One in-place write of new keys or values into a cache placeholder."""

    spelling: str
    """Name of the spelling: "index_copy", "indexed_assignment" or "slice_copy"."""
    node: Node
    """The node that performs the write."""
    erase: tuple[Node, ...]
    """What to erase when the write is rewritten, users first. Where the model reads the tensor
    that `index_copy_` returns, `Site.views` are users of it: erase those before these."""
    cache: Node
    """The placeholder written to, [B, H_kv, S, D]."""
    source: Node
    """The new keys or values, [B, H_kv, T, D]."""
    position: Node | int
    """The slots written: an integer index node [T], or where the written slice starts."""
    position_is_start: bool
    """True if `position` is the first slot of a slice, False if it is an index tensor."""


@dataclass(frozen=True)
class Mask:
    """What an attention does to its scores, [B or 1, H or 1, T or 1, S] or with fewer axes."""

    node: Node
    form: str
    """ "keep": bool, True where a slot is seen; "hide": bool, True where not; "add": float."""


@dataclass(frozen=True)
class Site:
    """An attention whose keys and values are read from two caches written just before it."""

    index: int
    """Position among all attentions of the graph, refused and plain ones included."""
    attention: Node
    inner: tuple[Node, ...]
    """What is erased right after the attention, users first: the steps of a hand-written one."""
    query: Node
    """[B, H_q, T, D], after its axes are permuted by `query_order`."""
    query_order: tuple[int, ...]
    output_order: tuple[int, ...]
    """How [B, H_q, T, D] is permuted to the attention's result."""
    spelling: str
    """How the model spells the attention: "sdpa", "matmul" or "einsum"."""
    key: CacheWrite
    value: CacheWrite
    views: tuple[Node, ...]
    """The nodes between the placeholders and the attention, users first, used by nothing else."""
    masks: tuple[Mask, ...]
    """All of them hold; SDPA has at most one."""
    is_causal: bool
    """Top-left aligned, as in SDPA: query i sees slots 0..i. Never together with a mask."""
    scale: float | None
    """None means SDPA's default, 1 / sqrt(D)."""
    group_size: int
    """Query heads per key/value head; query head h reads key/value head h // group_size."""
    gqa: str
    """How the model spells it: "none", "expand_reshape", "enable_gqa" or "repeat_interleave"."""
    read_end: Node | int | None
    """The end of a sliced read `cache[:, :, :end]`; None where the whole cache is read."""
    where: str
    """ "file.py:123 in forward", or "" if the graph does not say."""


@dataclass(frozen=True)
class Refusal:
    """An attention that has a cache and cannot be a site, with the first condition it failed."""

    index: int
    attention: Node
    code: str
    """Short and stable, for programs; see `match` for the list."""
    reason: str
    """For people: what failed, why it matters, and what to do where something can be done."""
    where: str


@dataclass(frozen=True)
class Match:
    """Every attention of one graph, in exactly one of three lists, each in graph order."""

    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]
    plain: tuple[Node, ...]
    """Attentions without a cache: nothing to rewrite and nothing to complain about."""


class Refused(Exception):
    """Raised inside the package by the first condition that fails."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
