"""Caches of layers that share a pool, driven by random vectors, and a plain model of them."""

from __future__ import annotations

import itertools
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from support import tiny
from torch import Tensor

import skv_compile as skv
from skv_compile.cache.state import LayerState
from skv_compile.codec import tiers
from skv_compile.errors import ConfigError
from skv_compile.lowering.codes import decode_radius, unpack_digits
from skv_compile.lowering.layout import EXACT_DTYPES, GAP_FILLER, PAGE_HEADER
from skv_compile.lowering.reference.pages import decode_records, encode_records
from skv_compile.lowering.state import CODED, LENGTH, PAD, PER_TIER
from skv_compile.lowering.turn import block_start, turn
from skv_compile.retention import budget
from skv_compile.retention.policies import POLICIES
from skv_compile.retention.table import save_table

LAYERS, HEADS, GROUP, DIM, SLOTS = 2, 2, 2, 16, 128
TRACKED = [name for name, policy in POLICIES.items() if policy.tracked]
QUERY_FREE = [name for name in TRACKED if not POLICIES[name].queries]

#: Of one (layer, row, head): i -> (tier, key, value), decoded in float64.
Kept = dict[int, tuple[int, Tensor, Tensor]]


def shorten(monkeypatch: Any) -> None:
    """Strides, rotary blocks and prompts so short that a few tokens have many of them."""
    monkeypatch.setattr(tiers, "STRIDE", 8)
    monkeypatch.setattr(tiers, "OBSERVED", 4)
    monkeypatch.setattr(tiers, "BLOCK_TOKENS", 16)
    monkeypatch.setattr(tiers, "CALIBRATE_TOKENS", 24)
    monkeypatch.setattr(budget, "LEAST_TOKENS", 8)


@cache
def _table() -> str:
    folder = tempfile.TemporaryDirectory()
    _table.folder = folder  # lives as long as the tests
    path = Path(folder.name) / "heads.json"
    save_table(str(path), ((0.1, 0.9), (0.5, 0.3)))
    return str(path)


@cache
def model_config() -> Any:
    return tiny("llama", LAYERS).config


def config_of(codec: str, policy: str, **kw: Any) -> skv.Config:
    table = _table() if policy == "retrieval" else None
    small = {"sinks": 2, "recent": 8, "page_tokens": 8}
    return skv.Config(codec=codec, retention=policy, retention_table=table, **{**small, **kw})


class Run:
    """A cache of two rows, and the exact vectors it has been given.

    ``k``, ``v`` [layer][row]: [H, n, D] of the tokens that are not padding.
    """

    def __init__(
        self,
        config: skv.Config,
        batch: int = 2,
        fill: int = 0xFF,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.cache = skv.SphericalCache(model_config(), SLOTS, config)
        self.batch, self.dtype, self.seed = batch, dtype, seed
        empty = torch.zeros(batch, HEADS, 0, DIM, dtype=dtype)
        for layer in self.cache.layers:
            layer.lazy_initialization(empty, empty)
        self.keeper.pool.memory.fill_(fill)
        self.forget()

    def forget(self) -> None:
        none = torch.zeros(HEADS, 0, DIM, dtype=self.dtype)
        self.k = [[none] * self.batch for _ in range(LAYERS)]
        self.v = [[none] * self.batch for _ in range(LAYERS)]
        self.pads, self.seen = [0] * self.batch, 0

    @property
    def keeper(self) -> Any:
        return self.cache.states[0].keeper

    @property
    def layout(self) -> Any:
        return self.keeper.layout

    def vectors(self, tokens: int) -> Tensor:
        """[layers, B, GROUP + 2, H, T, D]: queries and keys with directions in common."""
        g = torch.Generator().manual_seed(1000 * self.seed + self.seen)
        shape = (LAYERS, self.batch, GROUP + 2, HEADS, tokens, DIM)
        x = torch.randn(shape, generator=g, dtype=torch.float64)
        x[:, :, :-1, :, :, 0] *= 6
        return x.to(self.dtype)

    def forward(
        self, tokens: int, pads: list[int] | None = None, spoil: int = -1, look: bool = True
    ) -> list[Any]:
        """A forward of ``tokens`` tokens, ``pads`` of each row left padding.

        Returns of every layer the output and what it should be: attention over the exact window,
        the forward's own tokens, and what the pool holds (None without ``look``).

        ``spoil``: a layer with NaN among its keys.
        """
        first, last = self.seen, self.seen + tokens
        if pads is not None:
            self.pads = list(pads)
        slot = torch.arange(SLOTS)
        mask = slot <= torch.arange(first, last)[:, None]
        mask = (mask & (slot >= torch.tensor(self.pads)[:, None, None]))[:, None]
        found, given = [], self.vectors(tokens)
        for n, layer in enumerate(self.cache.layers):
            *q, k, v = given[n].unbind(1)
            q = torch.stack(q, 2).flatten(1, 2)  # query heads of a kv head follow one another
            if n == spoil:
                k[-1, -1, -1, -1] = torch.nan
            keys, values = layer.update(k, v)
            want = self.expected(n, q, k, v, mask) if look else None
            out = F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)
            found.append((out, want))
        for n in range(LAYERS):
            for row, pad in enumerate(self.pads):
                skip = max(0, pad - first)
                self.k[n][row] = torch.cat([self.k[n][row], given[n, row, -2, :, skip:]], 1)
                self.v[n][row] = torch.cat([self.v[n][row], given[n, row, -1, :, skip:]], 1)
        self.seen = last
        return found

    def crop(self, remove: int) -> None:
        self.cache.crop(-remove)
        self.seen -= remove
        self.pads = [min(pad, self.seen) for pad in self.pads]
        for side in (self.k, self.v):
            for rows in side:
                rows[:] = [x[:, : self.seen - pad] for x, pad in zip(rows, self.pads, strict=True)]

    def reset(self) -> None:
        self.cache.reset()
        self.forget()

    def select(self, rows: list[int]) -> None:
        self.cache.batch_select_indices(torch.tensor(rows))
        self.batch = len(rows)
        self.pads = [self.pads[n] for n in rows]
        self.k, self.v = ([[x[n] for n in rows] for x in side] for side in (self.k, self.v))

    # ------------------------------------------------------------ what there is

    def kept(self, layer: int) -> dict[tuple[int, int], Kept]:
        """Of every (row, head) what its list of pages holds, from the bytes' definition."""
        state, pool = self.cache.states[layer], self.keeper.pool
        found: dict[tuple[int, int], Kept] = {}
        for b, h in itertools.product(range(self.batch), range(HEADS)):
            kept: Kept = {}
            pages = state.tensors.table[b, h].tolist()
            used = [p for p in pages if p >= 0]
            assert pages == used + [-1] * (len(pages) - len(used))
            last: dict[int, int] = {}
            for page in used:
                i, kind = pool.info[page].tolist()
                tier, count = divmod(kind, PER_TIER)
                fields = self.layout.fields[tier]
                assert 0 < count <= self.layout.capacity[tier]
                at, slots = [], []
                for s, gap in enumerate(pool.memory[page, fields["gap"].slice].tolist()[:count]):
                    i += gap
                    if gap != GAP_FILLER:
                        assert i > last.get(tier, -1)  # in order
                        last[tier] = i
                        at.append(i)
                        slots.append(s)
                k, v = self._vectors(state, h, tier, pool.memory[page], slots, at)
                for n, number in enumerate(at):
                    assert number not in kept
                    kept[number] = (tier, k[n], v[n])
            found[b, h] = kept
        return found

    def _vectors(
        self, state: LayerState, h: int, tier: int, page: Tensor, slots: list[int], at: list[int]
    ) -> list[Tensor]:
        layout, out = self.layout, []
        fields = layout.fields[tier]
        for side, frame in zip(("key", "value"), _frames(state, tier), strict=True):
            names = ("keys",) if side == "key" else ("values",)
            if layout.kind == "exact":
                part = page[fields[names[0]].slice].view(layout.capacity[tier], -1)[slots]
                out.append(part.contiguous().view(EXACT_DTYPES[layout.dtype]).double())
                continue
            part = page[fields[f"{side}_digits"].slice].view(layout.capacity[tier], -1)[slots]
            radius = decode_radius(page[fields[f"{side}_radius"].slice][slots]).double()
            dims, shifts = frame.plan[h].long()
            weight = frame.grid[h, 0].double()[dims] * 2.0**shifts
            back = frame.back[h].double()
            x = (unpack_digits(part).double() - 1.5) * weight @ back[:-1][dims]
            x = x * radius[:, None] + back[-1]
            if side == "key" and layout.block and at:
                x = turn(x, block_start(torch.tensor(at), layout), state.tensors.turn)
            out.append(x)
        return out

    def expected(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Float64 attention of a forward's queries to all that is there."""
        layout, tokens = self.layout, k.shape[2]
        meta = self.cache.states[layer].tensors.meta
        dense = torch.zeros(2, self.batch, HEADS, SLOTS, DIM, dtype=torch.float64)
        there = torch.zeros(self.batch, HEADS, SLOTS, dtype=torch.bool)
        kept = self.kept(layer)
        for b, pad in enumerate(self.pads):
            coded, length = int(meta[b, CODED]), self.k[layer][b].shape[1]
            exact = [t for t in range(length) if t < layout.sinks or t >= layout.sinks + coded]
            at = pad + torch.tensor(exact, dtype=torch.int64)
            there[b, :, at] = True
            dense[0, b, :, at] = self.k[layer][b][:, exact].double()
            dense[1, b, :, at] = self.v[layer][b][:, exact].double()
            for h in range(HEADS):
                for i, (_, key, value) in kept[b, h].items():
                    slot = pad + layout.sinks + i
                    there[b, h, slot] = True
                    dense[0, b, h, slot], dense[1, b, h, slot] = key, value
        own = slice(self.seen, self.seen + tokens)
        there[:, :, own] = True
        dense[0, :, :, own], dense[1, :, :, own] = k.double(), v.double()
        keys, values = dense.repeat_interleave(GROUP, 2)
        see = mask & there.repeat_interleave(GROUP, 1)[:, :, None]
        logits = (q.double() @ keys.mT * DIM**-0.5).masked_fill(~see, -torch.inf)
        return torch.nan_to_num(logits.softmax(-1)) @ values

    def tiers_of(self) -> dict[tuple[int, int, int, int], int]:
        """(layer, row, head, i) -> tier of every token in the pool."""
        return {
            (n, b, h, i): tier
            for n in range(LAYERS)
            for (b, h), kept in self.kept(n).items()
            for i, (tier, _, _) in kept.items()
        }

    def check(self) -> None:
        """What must hold after every forward."""
        pool, layout = self.keeper.pool, self.layout
        owned = pool.table[pool.table >= 0].tolist()
        free = pool._free[: pool.free].tolist()
        assert len(owned) == pool.used
        assert sorted(owned + free) == list(range(pool.pages))
        for n, state in enumerate(self.cache.states):
            meta = state.tensors.meta
            assert meta[:, PAD].tolist() == self.pads
            assert meta[:, LENGTH].tolist() == [self.seen - pad for pad in self.pads]
            for (b, h), kept in self.kept(n).items():
                length, coded = meta[b, [LENGTH, CODED]].tolist()
                assert all(0 <= i < coded for i in kept)
                assert max(0, length - layout.sinks) - coded <= layout.ring
                assert coded <= max(0, length - layout.sinks)
                for i, (_, k, v) in kept.items():
                    assert bool(torch.isfinite(k).all() & torch.isfinite(v).all())
                    if layout.kind == "exact":
                        t = layout.sinks + i
                        assert torch.equal(k, self.k[n][b][h, t].double())
                        assert torch.equal(v, self.v[n][b][h, t].double())

    def check_codes(self) -> None:
        """Every code is as near to its vector as coding it, through any finer tiers, can be."""
        layout = self.layout
        if layout.kind == "exact":
            return
        for n, state in enumerate(self.cache.states):
            kept = self.kept(n)
            for b in range(self.batch):
                exact = [x[n][b][None, :, layout.sinks :] for x in (self.k, self.v)]
                allowed = _worst(exact, state, layout)
                for h in range(HEADS):
                    for i, (tier, *found) in kept[b, h].items():
                        for side in (0, 1):
                            x = exact[side][0, h, i].double()
                            error = (found[side] - x).norm()
                            assert error <= 1.02 * allowed[tier][side][h, i] + 1e-3 * x.norm()


def _worst(exact: list[Tensor], state: LayerState, layout: Any) -> dict[int, list[Tensor]]:
    """Of each tier the largest errors [H, n] of keys and values over all ways down to it."""
    count, finest = exact[0].shape[2], len(layout.tiers) - 1
    i = torch.arange(count)[None, None]
    worst: dict[int, list[Tensor]] = {}
    if count == 0:
        return worst
    for size in range(1, finest + 2):
        for way in itertools.combinations(range(finest, -1, -1), size):
            k, v = exact
            for tier in way:
                records = encode_records(k, v, i, state.tensors, layout, tier)
                k, v = decode_records(records, i, state.tensors, layout, tier)
            error = [(a - b).double().norm(dim=-1)[0] for a, b in zip((k, v), exact, strict=True)]
            old = worst.get(way[-1], error)
            worst[way[-1]] = [torch.maximum(a, b) for a, b in zip(old, error, strict=True)]
    return worst


def _frames(state: LayerState, tier: int) -> tuple[Any, Any]:
    if state.layout.kind == "exact":
        return None, None
    return state.tensors.frames(state.layout, tier)


def same(one: Run, other: Run) -> None:
    """Two runs hold the same, bit for bit."""
    a, b = one.keeper.pool, other.keeper.pool
    assert torch.equal(a.table, b.table)
    used = a.table[a.table >= 0].long()
    assert torch.equal(a.info[used], b.info[used])
    assert torch.equal(a.memory[used], b.memory[used])
    for x, y in zip(one.cache.states, other.cache.states, strict=True):
        assert torch.equal(x.tensors.meta, y.tensors.meta)


@cache
def least_budget(codec: str, policy: str) -> int:
    """The fewest bytes that are not refused: a page for every (layer, row, head)."""
    low, high = 0, 1 << 22
    while high - low > 1:
        middle = (low + high) // 2
        try:
            Run(config_of(codec, policy, budget=middle))
            high = middle
        except ConfigError:
            low = middle
    return high


def budget_of(codec: str, policy: str, pages: int) -> int:
    """Bytes for a pool of two rows with so many pages."""
    least = least_budget(codec, policy)
    pool = Run(config_of(codec, policy, budget=least)).keeper.pool
    assert pool.pages == LAYERS * 2 * HEADS
    return least + (pages - pool.pages) * (pool.layout.page_bytes + PAGE_HEADER)
