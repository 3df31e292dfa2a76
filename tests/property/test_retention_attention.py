"""What retention must not change: attention of a cache is attention over what is kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import HEADS, LAYERS, SLOTS, TRACKED, Run, config_of, least_budget, same, shorten
from support import NATIVE, greedy, max_error, padded_batch, tiny

import skv_compile as skv
from skv_compile.errors import ConfigError, NonFiniteError
from skv_compile.lowering.state import CODED

ROUNDING = 1e-12  # of float64 attention on values of order 1, with room for its ~100 terms
LAST = 90
EACH = pytest.mark.parametrize("policy", TRACKED)


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)


def gone(run: Run) -> int:
    """Tokens of the pool's groups that have been dropped."""
    return run.keeper.summary()["tokens_dropped"]


# ---------------------------------------------------------------- masking


@EACH
@pytest.mark.usefixtures("_short")
@given(
    prompt=st.integers(1, 70),
    pads=st.lists(st.integers(0, 20), min_size=2, max_size=2),
    chunks=st.lists(st.one_of(st.just(1), st.integers(1, 24)), max_size=10),
    bits=st.sampled_from([4.0, 16.0, 40.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=4)
def test_dropping_a_token_is_masking_it(policy, prompt, pads, chunks, bits, seed) -> None:
    run = Run(config_of("identity", policy, bits=bits), dtype=torch.float64, seed=seed)
    pads = [min(pad, prompt - 1) for pad in pads]
    for n in (prompt, *chunks, 9):
        if run.seen + n > SLOTS:
            break
        for out, want in run.forward(n, pads if run.seen == 0 else None):
            assert max_error(out, want) < ROUNDING
        run.check()


@EACH
@pytest.mark.usefixtures("_short")
def test_a_small_budget_does_drop_tokens_of_every_layer_and_row(policy: str) -> None:
    """Else masking would say nothing."""
    run = Run(config_of("identity", policy, bits=16.0), dtype=torch.float64)
    run.forward(60, [0, 5])
    for _ in range(40):
        for out, want in run.forward(1, look=run.seen % 8 == 0):
            assert want is None or max_error(out, want) < ROUNDING
    held = [len(kept) for n in range(LAYERS) for kept in run.kept(n).values()]
    total = sum(int(s.tensors.meta[:, CODED].sum()) for s in run.cache.states) * HEADS
    assert sum(held) == total - gone(run)
    # A quarter of float64 values, less the pages that are begun, and not full, in every group.
    assert 0.15 < sum(held) / total < 0.6


# ---------------------------------------------------------------- chunks


@EACH
@pytest.mark.usefixtures("_short")
@given(
    pads=st.lists(st.integers(0, 9), min_size=2, max_size=2),
    cuts=st.lists(st.integers(11, LAST - 1), max_size=12),
    codec=st.sampled_from(["identity", "grid"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=2)
def test_steps_and_forwards_within_a_stride_keep_the_same(policy, pads, cuts, codec, seed) -> None:
    """A stride leaves the window when it is full: before a forward, so none may go past it."""
    config = config_of(codec, policy, bits=3.0 if codec == "grid" else 16.0)
    stepped, chunked = Run(config, seed=seed), Run(config, seed=seed)
    layout = stepped.layout
    ends = {LAST, *cuts}
    for pad in pads:  # where a row's stride is full
        first = pad + layout.sinks + layout.recent
        ends |= set(range(first, LAST, layout.stride))
    given_all = stepped.vectors(SLOTS)  # the same whatever the chunks
    first = 10 + max(pads)
    for run in (stepped, chunked):
        run.vectors = lambda n, run=run: given_all[..., run.seen : run.seen + n, :]
        run.forward(first, pads, look=False)
    outs: list[list[torch.Tensor]] = [[], []]
    for end in sorted(x for x in ends if x > first):
        while stepped.seen < end:
            outs[0].append(torch.stack([out for out, _ in stepped.forward(1, look=False)]))
        pieces = chunked.forward(end - chunked.seen, look=False)
        outs[1].append(torch.stack([out for out, _ in pieces]))
        assert max_error(torch.cat(outs[0], 3), torch.cat(outs[1], 3)) < 2e-5
    for run in (stepped, chunked):
        run.keeper.maintain()
    same(stepped, chunked)
    assert stepped.kept(0)[0, 0] or gone(stepped)


# ---------------------------------------------------------------- budgets


@EACH
@pytest.mark.parametrize("codec", ["identity", "grid", "frame"])
@pytest.mark.usefixtures("_short")
def test_a_budget_beyond_need_keeps_every_token_at_its_best(policy: str, codec: str) -> None:
    for more in ({"budget": "1GiB"}, {"bits": 64.0}):
        run = Run(config_of(codec, policy, **more))
        run.forward(50, [0, 7], look=False)
        run.forward(30, look=False)
        for _ in range(10):
            run.forward(1, look=False)
        assert gone(run) == 0
        assert run.keeper.summary()["tokens_by_tier"][:-1] == [0] * (len(run.layout.tiers) - 1)
        run.check()


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("policy", TRACKED)
def test_pages_of_other_sizes_hold_the_same(policy: str) -> None:
    runs = [Run(config_of("identity", policy, budget="1GiB", page_tokens=n)) for n in (8, 16)]
    for run in runs:
        assert run.layout.stride == run.layout.page_tokens
        for n in (43, 3, 14, 1, 20, 1, 1):
            for out, want in run.forward(n, [0, 5] if n == 43 else None):
                assert max_error(out, want) < 2e-5
        run.keeper.maintain()
        run.check()
    # A stride is a page here: what has left the window differs, and what is kept does not.
    for n in range(LAYERS):
        for key, kept in runs[1].kept(n).items():
            other = runs[0].kept(n)[key]
            assert kept.keys() <= other.keys()
            for i, (tier, k, v) in kept.items():
                assert other[i][0] == tier
                assert torch.equal(other[i][1], k)
                assert torch.equal(other[i][2], v)


@EACH
@pytest.mark.usefixtures("_short")
def test_a_budget_below_the_least_is_refused_before_anything_is_there(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    enough = least_budget("identity", policy)
    run = Run(config_of("identity", policy, budget=enough))
    for n in (50, 30, 1, 1, 1):
        for out, want in run.forward(n, [0, 3] if n == 50 else None):
            assert max_error(out, want) < 2e-5
        run.check()

    made: list[tuple] = []
    original = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: made.append(a) or original(*a, **kw))
    for least in (enough - 1, 1000, 1):
        cache = skv.SphericalCache(
            tiny("llama").config, SLOTS, config_of("identity", policy, budget=least)
        )
        made.clear()
        k = torch.zeros(2, HEADS, 0, 16)
        with pytest.raises(ConfigError, match=r"too small.*Raise the budget"):
            cache.layers[0].lazy_initialization(k, k)
        assert not made
        assert not cache.states


# ---------------------------------------------------------------- failures


@EACH
@pytest.mark.parametrize("codec", ["identity", "grid"])
@pytest.mark.parametrize("tokens", [1, 5, 30])
@pytest.mark.usefixtures("_short")
def test_a_forward_that_fails_stores_nothing(policy: str, codec: str, tokens: int) -> None:
    run = Run(config_of(codec, policy, bits=3.0 if codec == "grid" else 16.0))
    run.forward(50, [0, 4], look=False)
    for _ in range(12):
        run.forward(1, look=False)
    run.cache.journal.commit()
    run.keeper.tick(8)  # what the next forward would move at once
    before = run.tiers_of()
    exact = [
        [x.clone() for x in (s.tensors.exact_keys, s.tensors.exact_values, s.tensors.meta)]
        for s in run.cache.states
    ]
    with pytest.raises(NonFiniteError):
        run.forward(tokens, spoil=1)
    after = run.tiers_of()
    assert after.keys() <= before.keys()
    assert all(after[key] <= before[key] for key in after)
    if tokens == 1:
        assert after == before
    for state, old in zip(run.cache.states, exact, strict=True):
        meta = state.tensors.meta
        assert torch.equal(meta, old[2])
        assert int(run.cache.get_seq_length()) == run.seen
    run.check()
    # What follows is attention over what is there.
    for n in (1, tokens, 1):
        for out, want in run.forward(n):
            assert max_error(out, want) < NATIVE
        run.check()


# ---------------------------------------------------------------- whole models


@pytest.mark.parametrize("codec", ["identity", "grid", "frame"])
@pytest.mark.usefixtures("_short")
def test_a_compiled_model_is_the_eager_one(codec: str, eager_inner: None) -> None:
    """A prompt past the window, then more than two strides of steps."""
    config = config_of(codec, "rdr", bits=16.0 if codec == "identity" else 3.0)
    ids, mask = padded_batch(2, 50)
    found, caches, forced = [], [], None
    for compiled in (False, True):
        model = tiny("llama")
        cache = skv.SphericalCache(model.config, max_cache_len=SLOTS, config=config)
        if compiled:
            skv.compile(model, config=config)
        tokens, logits = greedy(model, cache, ids, mask, 30, forced=forced)
        forced = tokens if forced is None else forced
        found.append(logits)
        caches.append(cache)
    assert max_error(*found) < NATIVE * found[0].abs().max()
    kept = [cache.summary() for cache in caches]
    assert kept[0]["tokens_dropped"] > 0
    assert kept[0]["tokens_by_tier"] == kept[1]["tokens_by_tier"]
    assert caches[0].states[0].tensors.meta[:, CODED].max() >= 64
