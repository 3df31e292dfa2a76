"""Layers that share a pool: what it is made of, and how large it gets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..codec.tiers import choose_layout, layouts
from ..config import Config
from ..errors import CapacityError, ConfigError
from ..lowering.layout import EXACT_DTYPES, PAGE_HEADER, Layout
from ..retention.budget import Rule
from ..retention.heads import Heads
from ..retention.keeper import Keeper
from ..retention.policies import make_policy
from .pool import Pool
from .schedule import Schedule

#: What torch's allocators say where they have no class of their own for it.
_NO_MEMORY = re.compile(r"can't allocate|not enough memory|Storage size calculation overflowed")


@contextmanager
def allocating(tokens: int) -> Iterator[None]:
    """Memory that is not there becomes an error that says which setting asked for it.

    Raises:
        CapacityError: a cache of ``tokens`` tokens does not fit.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        mine = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not mine and not _NO_MEMORY.search(str(error)):
            raise
        reason = str(error).split("\n")[0]
        raise CapacityError(
            f"there is no memory for a cache of {tokens} tokens ({reason}). Lower max_cache_len, "
            "the batch, sinks, recent or page_tokens, or set budget=."
        ) from error


def make_keeper(
    config: Config,
    layers: int,
    batch: int,
    heads: int,
    head_dim: int,
    max_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    group: int,
    budget: int | None,
    turned: bool,
) -> Keeper:
    """The pool of ``layers`` equal layers and its keeper; the states join it one by one.

    Args:
        group: query heads of a kv head. budget: bytes for all these layers, or None.
        turned: the model has a rotary plan.

    Raises:
        ConfigError: the budget does not hold the sinks, the window and the least of pages.
    """
    name = str(dtype).removeprefix("torch.")
    policy = make_policy(config, layers, heads)
    layout = choose_layout(config, head_dim, max_tokens, name, turned)
    if budget is not None and policy is None:
        layout = _finest_within(config, layout, layers, batch, heads, group, budget, turned, device)
    rule = Rule(layout, layers * batch * heads, None if budget is not None else config.bits)
    beside = taken = 0  # bytes of the kernels' list of work of every page; and of all but pages
    known = Heads.empty(layout, layers, batch, heads, len(layout.tiers) - 1, device)
    if policy is not None and budget is not None:
        fixed, beside = Schedule.cost(layers, batch, heads, group, layout, device)
        taken = layers * exact_bytes(layout, batch, heads, group) + known.bytes + fixed
        taken += frame_bytes(layout, heads, layers, config.frame is not None)
    pages = None if policy is None else rule.pool_pages(budget, beside, taken)
    pool = Pool(layers, batch, heads, layout, pages, device, group)
    keeper = Keeper(pool, policy, known, rule)
    keeper.budget = budget
    return keeper


def exact_bytes(layout: Layout, batch: int, heads: int, group: int) -> int:
    """Bytes of a layer's sinks, window, kept queries and counters."""
    vectors = 2 * layout.exact_slots + group * layout.observed
    size = EXACT_DTYPES[layout.dtype].itemsize
    turn = 8 * layout.head_dim if layout.block else 0
    return batch * heads * vectors * layout.head_dim * size + 32 * batch + turn


def frame_bytes(layout: Layout, heads: int, layers: int, saved: bool) -> int:
    """Bytes of the frames of all layers: their own, or those that all of them share."""
    if layout.kind == "exact":
        return 0
    own = layout.calibrate > 0 or saved
    dim, tiers = layout.head_dim, len(layout.tiers)
    first = layout.tiers[0]
    alike = layout.kind == "rings" or first.key == first.value  # keys and values share a rotation
    sides = 1 if alike and not own else 2
    transforms = sides * (dim * dim + (dim + 1) * dim) * (2 if own else 4)
    grids = 2 * tiers * 3 * dim * 4 + 4 * tiers * 4
    digits = sum(tier.key + tier.value for tier in layout.tiers)
    plans = 0 if layout.kind == "rings" else 2 * digits
    return heads * (transforms + grids + plans) * (layers if own else 1)


def _finest_within(
    config: Config,
    best: Layout,
    layers: int,
    batch: int,
    heads: int,
    group: int,
    budget: int,
    turned: bool,
    device: torch.device,
) -> Layout:
    """The finest tier, no finer than ``best``, that keeps all tokens within the budget."""
    chosen, sizes = None, []
    for layout in layouts(config, best.head_dim, best.max_tokens, best.dtype, turned):
        pages = batch * heads * layout.max_pages * (layout.page_bytes + PAGE_HEADER)
        own = pages + exact_bytes(layout, batch, heads, group)
        frames = frame_bytes(layout, heads, layers, config.frame is not None)
        work, _ = Schedule.cost(layers, batch, heads, group, layout, device)
        sizes.append(layers * own + frames + work)
        if layout.rate(0) <= best.rate(0) and sizes[-1] <= budget:
            chosen = layout
    if chosen is None:
        vectors = 2 * layers * batch * heads * best.exact_slots
        window = vectors * best.head_dim * EXACT_DTYPES[best.dtype].itemsize
        raise ConfigError(
            f"budget of {budget} bytes is too small: sinks and recent window alone take {window}, "
            f"the coarsest tier {min(sizes)} for {best.max_tokens} tokens. Raise the "
            "budget, lower max_cache_len, sinks or recent, or let a retention policy "
            "drop tokens."
        )
    return chosen
