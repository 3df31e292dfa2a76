"""Every method of a cache, in any order, with any arguments, beside plain dense tensors.

After each call the cache holds what the plain tensors say; or the call was refused, and nothing
has changed. A forward that stops halfway is undone by the call after it.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support import NATIVE, max_error, tiny
from torch import Tensor

import skv_compile as skv
from skv_compile.codec import tiers
from skv_compile.errors import CacheStateError, CapacityError, ConfigError, NonFiniteError
from skv_compile.lowering.state import CODED, LENGTH
from skv_compile.retention import budget

from .calls import EXAMPLES, Refused, attempt

WHERE = "test_cache_methods"
LAYERS, HEADS, GROUP, DIM, LENGTH_MAX = 2, 2, 2, 16, 72
MODEL = tiny("llama", LAYERS).config
SIZES = {"sinks": 3, "recent": 9, "page_tokens": 8}
MOST_ROWS = 4

# Small numbers first: most examples then do something before they go wrong.
tokens = st.one_of(st.integers(1, 3), st.integers(0, 30), st.integers(0, LENGTH_MAX + 3))
layer = st.integers(0, LAYERS - 1)
UNDONE = object()  # of a call that only said, and undid, what had stopped halfway
JUNK = [None, 1.5, "3", [], (), {}, float("nan"), 10**30, -(10**30), torch.zeros(2), b"1", print]
junk = st.integers(0, len(JUNK) - 1).map(lambda n: JUNK[n])
no_rows = st.one_of(
    junk,
    st.sampled_from([[9], [-1], [0.0], [[0]], [True] * 9, [2**40], [0, -1], [0j]]).map(
        torch.tensor
    ),
    st.sampled_from([torch.long, torch.bool]).map(lambda dtype: torch.zeros(0, dtype=dtype)),
)
SPOILS = (
    "nan", "inf", "nan value", "rows", "heads", "dim", "tokens", "dtype", "both dtypes", "meta",
    "no tensor", "three dims", "gradient", "query dim", "query rows", "mask",
)  # fmt: skip


def shape_of(batch: int, n: int, heads: int = HEADS) -> tuple[int, ...]:
    return batch, heads, n, DIM


def causal(seen: int, n: int) -> Tensor:
    return (torch.arange(LENGTH_MAX) <= torch.arange(seen, seen + n)[:, None])[None, None]


class Machine(RuleBasedStateMachine):
    """The rules; ``config`` and what can be compared are the subclasses'."""

    config: ClassVar[dict[str, Any]] = {}
    exact = True  # contents and attention are those of dense tensors

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.prepare()
        self.generator = torch.Generator().manual_seed(0)
        self.cache = skv.SphericalCache(MODEL, LENGTH_MAX, skv.Config(**{**SIZES, **self.config}))
        self.batch = 2
        self.forget()
        self.half = False  # a forward has stopped between layers
        self.left: tuple[Any, Any] | None = None  # a cache that was copied, and what it held
        self.sizes: set[int] = set()

    def prepare(self) -> None:
        """Before the cache is made."""

    def teardown(self) -> None:
        self.patch.undo()

    def forget(self) -> None:
        self.k = [torch.zeros(shape_of(self.batch, 0))] * LAYERS
        self.v = list(self.k)

    @property
    def seen(self) -> int:
        return self.k[0].shape[2]

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def call(self, function: Any, *args: Any, also: Any = (), **kw: Any) -> Any:
        """Call; where a forward had stopped halfway, the first call of its kind says so."""
        result = attempt(WHERE, function, *args, also=also, **kw)
        if self.half and isinstance(result, Refused):
            assert isinstance(result.error, CacheStateError), result
            assert "failed halfway" in result.text
            self.half = False
            return UNDONE
        return result

    # ------------------------------------------------------------ forwards

    def attend(self, n: int, q: Tensor, k: Any, v: Any, mask: Tensor, style: str) -> Tensor:
        """One layer's attention to the cache, in one of the ways that models write it."""
        keys, values = self.cache.update(k, v, n)
        if style == "repeat":
            keys, values = (x.repeat_interleave(GROUP, 1) for x in (keys, values))
        elif style == "expand":
            five = (keys.shape[0], HEADS, GROUP, *keys.shape[2:])
            whole = (keys.shape[0], HEADS * GROUP, *keys.shape[2:])
            keys, values = (x[:, :, None, :, :].expand(five).reshape(whole) for x in (keys, values))
        elif style == "dense":
            keys, values = keys + 0, values + 0
        elif style == "float":
            mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        return F.scaled_dot_product_attention(
            q, keys, values, mask, enable_gqa=style not in ("repeat", "expand")
        )

    def expected(self, q: Tensor, k: Tensor, v: Tensor, seen: int) -> Tensor:
        keys, values = (x.double().repeat_interleave(GROUP, 1) for x in (k, v))
        mask = causal(seen, q.shape[2])[..., : k.shape[2]]
        logits = (q.double() @ keys.mT * DIM**-0.5).masked_fill(~mask, -torch.inf)
        return logits.softmax(-1) @ values

    @initialize(batch=st.integers(1, 3), n=st.integers(0, 60))
    def begin(self, batch: int, n: int) -> None:
        self.batch = batch
        self.forget()
        if n % 4:  # most caches hold something when it begins
            self.forward(n, "gqa", 1.0)

    @rule(
        n=tokens,
        style=st.sampled_from(["gqa", "gqa", "repeat", "expand", "float", "dense"]),
        scale=st.sampled_from([1.0, 1.0, 1e-4, 1e3]),
    )
    def forward(self, n: int, style: str, scale: float) -> None:
        if style == "dense" and not self.exact:
            style = "gqa"
        before, made = self.seen, []
        for index in range(LAYERS):
            q = self.random(*shape_of(self.batch, n, HEADS * GROUP))
            k, v = (self.random(*shape_of(self.batch, n)) for _ in range(2))
            v = scale * v
            out = self.call(self.attend, index, q, k, v, causal(before, n), style)
            if out is UNDONE:
                return
            if isinstance(out, Refused):
                assert isinstance(out.error, CapacityError)
                assert before + n > LENGTH_MAX
                assert index == 0
                return
            assert before + n <= LENGTH_MAX
            assert out.shape == q.shape
            assert torch.isfinite(out).all()
            k, v = torch.cat([self.k[index], k], 2), torch.cat([self.v[index], v], 2)
            if self.exact:
                want = self.expected(q, k, v, before)
                assert n == 0 or max_error(out, want) < NATIVE * max(1.0, float(v.abs().max()))
            made.append((k, v))
        self.k, self.v = (list(x) for x in zip(*made, strict=True))

    @rule(n=st.integers(1, 20), read=st.booleans())
    def stop_halfway(self, n: int, read: bool) -> None:
        """A forward that ends after its first layer, before or after that layer's attention."""
        if self.seen + n > LENGTH_MAX:
            return
        q = self.random(*shape_of(self.batch, n, HEADS * GROUP))
        k = self.random(*shape_of(self.batch, n))
        if read:
            done = self.call(self.attend, 0, q, k, k, causal(self.seen, n), "gqa")
        else:
            done = self.call(self.cache.update, k, k, 0)
        assert not isinstance(done, Refused)
        self.half = done is not UNDONE

    @rule(n=st.integers(0, 20), index=layer, spoil=st.sampled_from(SPOILS))
    def bad_forward(self, n: int, index: int, spoil: str) -> None:
        """A forward that one layer has to refuse leaves nothing of itself."""
        if self.seen + n > LENGTH_MAX or (n == 0 and spoil in ("nan", "inf", "nan value")):
            return
        # A layer that holds nothing yet takes a shape and a dtype as they come.
        new = self.cache.layers[index].state is None
        taken = new and (spoil == "both dtypes" or (spoil == "rows" and index == 0))
        for each in range(index + 1):
            q = self.random(*shape_of(self.batch, n, HEADS * GROUP))
            k, v = (self.random(*shape_of(self.batch, n)) for _ in range(2))
            mask = causal(self.seen, n)
            if each == index:
                q, k, v, mask = self.spoil(spoil, q, k, v, mask)
            done = self.call(self.attend, each, q, k, v, mask, "gqa")
            if done is UNDONE:
                return
            assert isinstance(done, Refused) == (each == index and not taken), (spoil, done)
        if taken:
            self.cache = skv.SphericalCache(MODEL, LENGTH_MAX, self.cache.config)
            self.forget()
            self.half = False

    def spoil(self, how: str, q: Tensor, k: Any, v: Any, mask: Tensor) -> tuple[Any, ...]:
        n = k.shape[2]
        if how in ("nan", "inf"):
            k[-1, -1, n // 2, 3] = float(how)
        elif how == "nan value":
            v[0, 0, n // 2, 0] = torch.nan
        elif how == "rows":
            q, k, v = (torch.cat([x, x]) for x in (q, k, v))
        elif how == "heads":
            v = v[:, :1]
        elif how == "dim":
            k, v = torch.cat([k, k], -1), v
        elif how == "tokens":
            v = torch.cat([v, v[:, :, :1], self.random(*shape_of(self.batch, 1))], 2)
        elif how == "dtype":
            v = v.double()
        elif how == "both dtypes":
            q, k, v = q.half(), k.half(), v.half()
        elif how == "meta":
            k, v = k.to("meta"), v.to("meta")
        elif how == "no tensor":
            k = None
        elif how == "three dims":
            k, v = k[0], v[0]
        elif how == "gradient":
            k.requires_grad_()
        elif how == "query dim":
            q = q[..., :7]
        elif how == "query rows":
            q = torch.cat([q, q, q])
        elif how == "mask":
            mask = mask[..., :5]
        return q, k, v, mask

    def no_such_layer(self, index: Any) -> None:
        if isinstance(index, int) and -LAYERS <= index < LAYERS:
            return
        k = self.random(*shape_of(self.batch, 1))
        # What transformers does with a wrong index: no layer has been asked.
        result = attempt(WHERE, self.cache.update, k, k, index, also=(IndexError, TypeError))
        assert isinstance(result, Refused)

    # ------------------------------------------------------------ between forwards

    @rule(n=st.one_of(st.integers(-20, 0), st.integers(-LENGTH_MAX - 5, LENGTH_MAX + 5)))
    def crop(self, n: int) -> None:
        result = self.call(self.cache.crop, n)
        if result is UNDONE:
            return
        if isinstance(result, Refused):
            assert isinstance(result.error, CacheStateError)
            assert -n > self.seen
            return
        left = self.seen + n if n <= 0 else min(self.seen, n)
        if self.cache.states:
            assert left >= 0
            self.k, self.v = ([x[:, :, :left] for x in side] for side in (self.k, self.v))

    def crop_junk(self, n: Any) -> None:
        if isinstance(n, int):
            return
        result = attempt(WHERE, self.cache.crop, n)
        assert isinstance(result, Refused)
        assert isinstance(result.error, ConfigError)

    @rule()
    def reset(self) -> None:
        attempt(WHERE, self.cache.reset)
        self.half = False
        self.forget()

    @rule(
        rows=st.lists(st.integers(0, 2), min_size=1, max_size=MOST_ROWS),
        way=st.sampled_from(["select", "reorder", "mask", "int32"]),
    )
    def select(self, rows: list[int], way: str) -> None:
        rows = [n % self.batch for n in rows]
        index = torch.tensor(rows)
        if way == "mask":
            index = torch.zeros(self.batch, dtype=torch.bool)
            index[rows] = True
            rows = sorted(set(rows))
        if way == "int32":
            index = index.int()
        call = self.cache.reorder_cache if way == "reorder" else self.cache.batch_select_indices
        result = self.call(call, index)
        if result is UNDONE or not self.cache.states or self.too_many(result):
            return
        self.take(rows)

    def too_many(self, result: Any) -> bool:
        """Whether more rows were refused, as only a budget may."""
        if not isinstance(result, Refused):
            return False
        assert isinstance(result.error, ConfigError)
        assert "Raise the budget" in result.text
        assert self.cache.config.budget is not None
        return True

    def take(self, rows: list[int]) -> None:
        self.batch = len(rows)
        self.k, self.v = ([x[rows] for x in side] for side in (self.k, self.v))
        self.sizes.clear()

    def select_junk(self, rows: Any) -> None:
        if not self.cache.states:
            return
        result = self.call(self.cache.batch_select_indices, rows)
        assert result is UNDONE or isinstance(result, Refused)

    @rule(n=st.integers(1, 2))
    def repeat(self, n: int) -> None:
        if self.batch * n > MOST_ROWS:
            return
        result = self.call(self.cache.batch_repeat_interleave, n)
        if result is UNDONE or not self.cache.states or self.too_many(result):
            return
        self.take([row for row in range(self.batch) for _ in range(n)])

    def repeat_junk(self, n: Any) -> None:
        if not self.cache.states or self.half:
            return
        result = attempt(WHERE, self.cache.batch_repeat_interleave, n)
        assert isinstance(result, Refused)

    def early(self, rows: int, dtype: torch.dtype) -> None:
        """Allocating does nothing to layers that are there."""
        there, device = bool(self.cache.states), torch.device("cpu")
        shape = (rows, HEADS, DIM, dtype, device)
        result = attempt(WHERE, self.cache.early_initialization, *shape, also=(RuntimeError,))
        if isinstance(result, Refused) or there:
            assert there or rows < 1 or dtype is torch.int8 or self.too_many(result)
            return
        self.batch = rows
        self.forget()

    @rule(index=st.integers(-LAYERS, 9), n=st.integers(-3, 99))
    def look(self, index: int, n: int) -> None:
        """What only reads."""
        cache = self.cache
        length = attempt(WHERE, cache.get_seq_length, index)
        if not self.half:
            assert length == (self.seen if index < LAYERS else 0)
        if index < LAYERS:
            assert attempt(WHERE, cache.get_mask_sizes, n, index) == (LENGTH_MAX, 0)
            assert attempt(WHERE, cache.get_max_length, index) == LENGTH_MAX
        if cache.states:
            assert cache.batch_size == self.batch
            bits = attempt(WHERE, lambda: cache.bits_per_coordinate)
            assert 0 < bits <= 64
            if not self.half:
                summary = attempt(WHERE, cache.summary)
                assert summary["seen_tokens"] == self.seen
                assert summary["stored_tokens"] == [self.seen] * self.batch
                assert summary["resident_bytes"] == cache.resident_bytes
        else:
            assert isinstance(attempt(WHERE, lambda: cache.bits_per_coordinate), Refused)
        assert len(cache) == LAYERS
        assert cache.is_compileable
        assert "SphericalLayer" in repr(cache)
        for door in (cache.layers[0].offload, cache.layers[1].prefetch):
            assert isinstance(attempt(WHERE, door), Refused)
        if cache.states:
            assert isinstance(attempt(WHERE, cache.layers[0].reorder_cache, None), Refused)

    @rule(way=st.sampled_from(["deepcopy", "pickle"]))
    def go_on_with_a_copy(self, way: str) -> None:
        """A copy is a cache of its own; what it was copied from stays what it was."""
        if self.half:
            return
        old = self.cache
        if way == "deepcopy":
            self.cache = attempt(WHERE, copy.deepcopy, old)
        else:
            self.cache = attempt(WHERE, lambda: pickle.loads(pickle.dumps(old)))
        self.left = (old, self.contents(old))

    @rule(data=st.data(), which=st.sampled_from(["layer", "crop", "select", "repeat", "early"]))
    def junk(self, data: st.DataObject, which: str) -> None:
        """Arguments that mean nothing. One rule, for forwards not to become rare."""
        if which == "layer":
            self.no_such_layer(data.draw(st.one_of(junk, st.integers(-9, 9))))
        elif which == "crop":
            self.crop_junk(data.draw(junk))
        elif which == "select":
            self.select_junk(data.draw(no_rows))
        elif which == "repeat":
            self.repeat_junk(data.draw(st.one_of(junk, st.integers(-5, 0))))
        else:
            dtypes = st.sampled_from([torch.float32, torch.int8])
            self.early(data.draw(st.integers(-2, 3)), data.draw(dtypes))

    # ------------------------------------------------------------ what must hold

    def contents(self, cache: Any) -> list[Any]:
        """Of every layer what it holds, as far as that is plain numbers."""
        return [(s.tensors.meta.clone(), *s.dense()) for s in cache.states]

    @invariant()
    def holds_what_the_tensors_say(self) -> None:
        if self.left is not None:
            old, before = self.left
            for one, other in zip(self.contents(old), before, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        if self.half:
            return
        pools = {id(s.keeper) for s in self.cache.states}
        assert len(pools) <= 1  # else they do not share the budget
        for index, each in enumerate(self.cache.layers):
            state = each.state
            if state is None:
                assert self.seen == 0
                continue
            assert int(each.cumulative_length) == self.seen
            assert state.batch == each.batch_size == self.batch
            meta = state.tensors.meta
            assert meta[:, LENGTH].tolist() == [self.seen] * self.batch
            assert (meta[:, CODED] <= max(0, self.seen - SIZES["sinks"])).all()
            self.check(index, state)
        if len(self.cache.states) == LAYERS:
            self.sizes.add(self.cache.resident_bytes)
            assert len(self.sizes) == 1
            limit = self.cache.config.budget_bytes
            assert limit is None or self.cache.resident_bytes <= limit

    def check(self, index: int, state: Any) -> None:
        for dense, want in zip(state.dense(), (self.k[index], self.v[index]), strict=True):
            assert torch.equal(dense[:, :, : self.seen], want)
            assert not dense[:, :, self.seen :].any()


class Identity(Machine):
    config: ClassVar = {"codec": "identity"}


class Tracked(Machine):
    """Pages that tokens are chosen for: what is stored cannot be compared, who owns it can."""

    config: ClassVar = {"codec": "frame", "retention": "rdr", "bits": 3.0}
    exact = False

    def prepare(self) -> None:
        # So short that a few tokens have many of them.
        for name, value in (("STRIDE", 8), ("OBSERVED", 4), ("BLOCK_TOKENS", 16)):
            self.patch.setattr(tiers, name, value)
        self.patch.setattr(tiers, "CALIBRATE_TOKENS", 24)
        self.patch.setattr(budget, "LEAST_TOKENS", 8)

    def contents(self, cache: Any) -> list[Any]:
        return [
            (s.tensors.meta.clone(), s.tensors.table.clone(), s.tensors.pool.clone())
            for s in cache.states
        ]

    def check(self, index: int, state: Any) -> None:
        pool, index = state.keeper.pool, state.index
        owned = pool.table[pool.table >= 0].tolist()
        free = pool._free[: pool.free].tolist()
        assert len(owned) == pool.used
        assert sorted(owned + free) == list(range(pool.pages))  # none twice, none lost
        read = pool.read([index])
        rows = HEADS * self.batch
        for part in read.tokens:
            assert ((part.group >= index * rows) & (part.group < (index + 1) * rows)).all()
            row = part.group // HEADS % self.batch
            assert (part.i >= 0).all()
            assert (part.i < state.tensors.meta[row, CODED]).all()
            assert torch.isfinite(part.score).all()
            assert torch.isfinite(part.key_radius).all()
            assert torch.isfinite(part.value_radius).all()
        places = torch.cat([torch.stack([x.group, x.i]) for x in read.tokens], 1)
        assert places.shape[1] == places.unique(dim=1).shape[1]
        for frame in state.tensors[-9:]:
            assert not frame.is_floating_point() or torch.isfinite(frame).all()

    @rule(n=st.integers(1, 30), bad=st.sampled_from([torch.nan, torch.inf, 1e30, 0.0]))
    def strange_queries(self, n: int, bad: float) -> None:
        """Queries are not stored: whatever they are, later forwards are finite."""
        if self.half or self.seen + n > LENGTH_MAX:
            return
        made = []
        for index in range(LAYERS):
            q = self.random(*shape_of(self.batch, n, HEADS * GROUP))
            q[0, :, -1] = bad
            k, v = (self.random(*shape_of(self.batch, n)) for _ in range(2))
            out = attempt(WHERE, self.attend, index, q, k, v, causal(self.seen, n), "gqa")
            if isinstance(out, Refused):  # no frame can be fitted to a prompt of such queries
                assert isinstance(out.error, NonFiniteError)
                assert self.seen == 0
                assert n >= tiers.CALIBRATE_TOKENS
                return
            assert torch.isfinite(out[1:]).all()
            assert torch.isfinite(out[0, :, :-1]).all()
            made.append((torch.cat([self.k[index], k], 2), torch.cat([self.v[index], v], 2)))
        self.k, self.v = (list(x) for x in zip(*made, strict=True))


class Budgeted(Tracked):
    config: ClassVar = {**Tracked.config, "budget": "64kB"}


#: One step is a few milliseconds, or tens where pages are chosen.
PHASES = (Phase.explicit, Phase.generate)  # to shrink takes minutes
few = settings(max_examples=12, stateful_step_count=20, phases=PHASES)
many = settings(max_examples=EXAMPLES or 300, stateful_step_count=40, phases=PHASES)


def run(machine: type[Machine], how: Any) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(machine, settings=how)


@pytest.mark.parametrize("machine", [Identity, Tracked, Budgeted])
def test_any_calls_in_any_order(machine: type[Machine]) -> None:
    run(machine, settings(few, max_examples=60) if machine is Identity else few)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [Identity, Tracked, Budgeted])
def test_many_calls_in_any_order(machine: type[Machine]) -> None:
    run(machine, many)


def test_rows_chosen_before_every_layer_is_there_keep_the_budget() -> None:
    """What the machine found: the pool was made as if the layers to come took nothing."""
    config = skv.Config(**SIZES, bits=3.0, budget=1)
    there = skv.SphericalCache(MODEL, LENGTH_MAX, config)
    shape = (2, HEADS, DIM, torch.float32, torch.device("cpu"))
    refused = attempt(WHERE, there.early_initialization, *shape)
    least = int(refused.text.split(" in all")[0].split(", ")[-1])
    cache = skv.SphericalCache(MODEL, LENGTH_MAX, config.replace(budget=least))
    cache.update(torch.randn(shape_of(1, 5)), torch.randn(shape_of(1, 5)), 0)
    attempt(WHERE, cache.reset)
    attempt(WHERE, cache.batch_repeat_interleave, 2)
    for index in range(LAYERS):
        k, q = torch.randn(shape_of(2, 60)), torch.randn(shape_of(2, 60, HEADS * GROUP))
        keys, values = attempt(WHERE, cache.update, k, k, index)
        F.scaled_dot_product_attention(q, keys, values, causal(0, 60), enable_gqa=True)
    assert len(cache.keepers) == 1
    assert cache.resident_bytes <= least
