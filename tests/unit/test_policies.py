"""Retention policies: what each keeps, and what all of them promise."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import NATIVE, greedy, max_error, padded_batch, tiny
from torch import Tensor
from torch._dynamo.utils import counters

import skv_compile as skv
from skv_compile.codec.tiers import choose_layout
from skv_compile.errors import ConfigError
from skv_compile.lowering.codes import decode_score
from skv_compile.retention.decide import decide
from skv_compile.retention.heads import Heads
from skv_compile.retention.policies import POLICIES
from skv_compile.retention.policies.base import Policy, Seen
from skv_compile.retention.policies.h2o import H2O
from skv_compile.retention.policies.prefix import PrefixKV
from skv_compile.retention.policies.retrieval import Retrieval
from skv_compile.retention.policies.snapkv import SnapKV
from skv_compile.retention.policies.streaming import Streaming
from skv_compile.retention.policies.window import WindowKV
from skv_compile.retention.table import save_table
from skv_compile.retention.tokens import Tokens, pages_for

TRACKED = [name for name, policy in POLICIES.items() if policy.tracked]
EVICTING = [name for name in TRACKED if name != "rdr"]
LAYERS, BATCH, HEADS = 8, 2, 2
EACH = pytest.mark.parametrize("name", TRACKED)


def heads_of(layers: int = LAYERS) -> Heads:
    layout = choose_layout(skv.Config(), 64, 4096, "float32")
    tiers = len(layout.tiers)
    heads = Heads.empty(layout, layers, BATCH, HEADS, tiers - 1, torch.device("cpu"))
    heads.key_loss[:] = heads.value_loss[:] = 0.25 ** torch.arange(tiers)
    return heads


def policy_of(name: str, heads: Heads, seed: int = 0) -> Policy:
    if name != "retrieval":
        return POLICIES[name]()
    table = torch.rand(heads.layers, heads.heads, generator=torch.Generator().manual_seed(seed))
    return Retrieval(table=tuple(map(tuple, table.tolist())))


def tokens_of(heads: Heads, n: int, score: Tensor | None = None, seed: int = 0) -> Tokens:
    """n fresh tokens of every head; ``score`` [layers, batch, heads, n], random if not given."""
    shape = (heads.layers, heads.batch, heads.heads, n)
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(shape, generator=generator) if score is None else score
    group = torch.arange(heads.groups).view(shape[:3])[..., None].expand(shape)
    one = torch.ones(group.numel())
    level = torch.full_like(group, heads.tiers).flatten()
    i = torch.arange(n).expand(shape).flatten()
    return Tokens(group.flatten(), i, level, score.flatten(), one, one.clone(), one.bool())


def kept(policy: Policy, tokens: Tokens, heads: Heads, allowed: int) -> Tensor:
    """[layers, batch, heads, n] bool."""
    level = decide(policy, tokens, heads, {}, allowed)
    return (level > 0).view(heads.layers, heads.batch, heads.heads, -1)


def seen_of(weights: Tensor, prompt: bool = True, counted: Tensor | None = None) -> Seen:
    """Of weights [S, n], the same for 2 heads of 3 query heads each."""
    if counted is None:
        counted = torch.ones_like(weights, dtype=torch.bool)
    return Seen(weights.expand(1, 2, 3, *weights.shape), counted[None], prompt)


# ---------------------------------------------------------------- all of them


def test_the_registry_names_every_policy_and_its_paper() -> None:
    names = ["rdr", "none", "streaming", "snapkv", "h2o", "window", "prefix", "retrieval"]
    assert list(POLICIES) == names
    for name, kind in POLICIES.items():
        assert kind.name == name
        policy = policy_of(name, heads_of())
        assert hash(policy) == hash(dataclasses.replace(policy))
        with pytest.raises(dataclasses.FrozenInstanceError):
            policy.decay = 0.0
        if kind.tracked:
            title = kind.paper.split(" (")[0].split(":")[0]
            assert title
            assert title in " ".join(str(kind.__doc__).split())
            assert abs(sum(policy.shares(30)) / 30 - 1) < 1e-9
            assert min(policy.shares(30)) >= 0


@EACH
@given(seed=st.integers(0, 99), ties=st.booleans(), n=st.sampled_from([1, 7, 64, 200]))
def test_steps_are_an_order_that_no_listing_changes(
    name: str, seed: int, ties: bool, n: int
) -> None:
    torch.manual_seed(seed)
    heads = heads_of()
    policy = policy_of(name, heads, seed)
    tokens = tokens_of(heads, n, seed=seed)
    if ties:  # as scores come from the pool
        codes = torch.randint(0, 4, tokens.score.shape) * 40
        tokens.score = decode_score(codes.to(torch.uint8))
    tokens.level[torch.rand(len(tokens)) < 0.1] = 0  # padding
    steps = policy.steps(tokens, heads, {})
    assert steps.shape == (len(tokens), heads.tiers)
    assert torch.isfinite(steps).all()
    assert (steps.diff(dim=1) <= 0).all()
    assert torch.equal(policy.steps(tokens, heads, {}), steps)
    mixed = torch.randperm(len(tokens))
    if not ties:
        assert torch.equal(policy.steps(tokens[mixed], heads, {}), steps[mixed])
    level = decide(policy, tokens, heads, {}, 300)
    assert torch.equal(decide(policy, tokens[mixed], heads, {}, 300), level[mixed])


@EACH
@given(
    allowed=st.integers(0, 3000),
    n=st.integers(1, 400),
    far=st.sampled_from([1, 9, 300]),
    seed=st.integers(0, 99),
)
def test_pages_are_never_exceeded(name: str, allowed: int, n: int, far: int, seed: int) -> None:
    """Long gaps between tokens take slots too."""
    heads = heads_of()
    tokens = tokens_of(heads, n, seed=seed)
    tokens.i = tokens.i * far
    level = decide(policy_of(name, heads), tokens, heads, {}, allowed)
    assert pages_for(tokens.at(level), heads.layout) <= allowed


@pytest.mark.parametrize("name", EVICTING)
def test_plentiful_pages_are_used(name: str) -> None:
    heads, allowed = heads_of(), 3200
    tokens = tokens_of(heads, 2048)
    level = decide(policy_of(name, heads), tokens, heads, {}, allowed)
    assert 0.99 * allowed <= pages_for(tokens.at(level), heads.layout) <= allowed
    assert set(level.tolist()) == {0, heads.tiers}


@EACH
@pytest.mark.parametrize("prompt", [True, False])
def test_scores_of_any_attention_are_finite(name: str, prompt: bool) -> None:
    policy = policy_of(name, heads_of())
    one_hot = torch.zeros(20, 50)
    one_hot[:, 17] = 1
    none = torch.zeros(20, 50, dtype=torch.bool)
    for weights in (torch.zeros(20, 50), one_hot, torch.full((20, 50), 0.02)):
        for counted in (None, none):
            score = policy.observe(seen_of(weights, prompt, counted))
            assert score.shape == (1, 2, 50)
            for x in (score, policy.update(score, score)):
                assert torch.isfinite(x).all()
                assert (x >= 0).all()
            if counted is None and weights is one_hot:
                assert score[0, 0, 17] == score.max() > 0
    empty = policy.observe(seen_of(torch.zeros(20, 0), prompt))
    assert empty.shape == (1, 2, 0)


# ---------------------------------------------------------------- each of them


def test_streaming_keeps_the_most_recent_tokens_of_every_head() -> None:
    heads = heads_of()
    stays = kept(Streaming(), tokens_of(heads, 300), heads, 640)
    count = stays.sum(-1)
    assert (count == 640 // heads.groups * heads.layout.capacity[-1]).all()
    assert (stays == (torch.arange(300) >= 300 - count[..., None])).all()


def test_snapkv_keeps_what_the_last_queries_see_with_its_neighbours() -> None:
    heads = heads_of()
    tokens = tokens_of(heads, 300)
    stays = kept(SnapKV(), tokens, heads, 640)
    score = tokens.score.view(stays.shape)
    n = 640 // heads.groups * heads.layout.capacity[-1]
    best = torch.zeros_like(stays).scatter_(-1, score.topk(n).indices, True)
    assert torch.equal(stays, best)

    weights = torch.zeros(20, 50)
    weights[:, 17] = 0.7
    score = SnapKV().observe(seen_of(weights))[0, 0]
    assert torch.equal(score.nonzero().squeeze(1), torch.arange(14, 21))
    assert torch.allclose(score[14:21], torch.tensor(0.1))
    score = SnapKV().observe(seen_of(weights, prompt=False))[0, 0]
    assert torch.equal(score.nonzero().squeeze(1), torch.tensor([17]))


def test_h2o_adds_up_the_attention_of_all_queries() -> None:
    policy, weights = H2O(), torch.full((20, 50), 0.02)
    counted = torch.ones(20, 50, dtype=torch.bool)
    counted[10:, 30] = False  # in the exact window of half of the queries
    score = policy.observe(seen_of(weights, True, counted))[0, 0]
    assert torch.allclose(score[:30], torch.tensor(50 * 0.02))  # 20 queries stand for 50
    assert torch.allclose(score[30], torch.tensor(25 * 0.02))
    later = policy.observe(seen_of(weights, False, counted))[0, 0]
    assert torch.allclose(later[:30], torch.tensor(4 * 20 * 0.02))
    assert torch.equal(policy.update(score, later), score + later)

    heads = heads_of()
    tokens = tokens_of(heads, 300)
    stays = kept(policy, tokens, heads, 640)
    score = tokens.score.view(stays.shape)
    lowest = score.masked_fill(~stays, 2).amin(-1)
    assert (lowest > score.masked_fill(stays, -1).amax(-1)).all()


@pytest.mark.parametrize("scoring", ["mean", "top"])
def test_windows_are_whole_and_the_same_in_all_heads_of_a_group_of_layers(scoring: str) -> None:
    heads = heads_of(10)
    policy = WindowKV(scoring=scoring)
    tokens = tokens_of(heads, 512)
    stays = kept(policy, tokens, heads, 1000)
    window = stays.unflatten(-1, (64, 8))
    assert torch.equal(window.any(-1), window.all(-1))
    for first in (0, 4, 8):
        assert (stays[first : first + 4] == stays[first, :, :1]).all()
    assert not torch.equal(stays[0], stays[4])
    counts = stays.sum((1, 2, 3))
    assert counts[0] > counts[4] > counts[8] > 0

    # A prompt's layers come one by one, and its memory makes the same of them.
    memo: dict[Any, Any] = {}
    for layer in range(heads.layers):
        mine = tokens[heads.layer(tokens.group) == layer]
        level = decide(policy, mine, heads, memo, 1000)
        assert torch.equal(level > 0, stays[layer].flatten())


def test_a_window_counts_as_its_mean_or_as_its_upper_half() -> None:
    heads = heads_of(1)
    score = torch.zeros(1, BATCH, HEADS, 16)
    score[..., :4], score[..., 8:] = 0.5, 0.3  # half of the one window, all of the other
    tokens = tokens_of(heads, 16, score)
    for scoring, best in (("mean", 8), ("top", 0)):
        steps = WindowKV(scoring=scoring).steps(tokens, heads, {})[:, 0].view(-1, 16)
        assert (steps.argmax(-1) == best).all()
    for wrong in ({"scoring": "max"}, {"layers_together": 0}, {"slope": 1.5}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            WindowKV(**wrong)


def test_a_layer_that_looks_at_few_tokens_keeps_few() -> None:
    heads = heads_of(3)
    shape = (BATCH, HEADS, 512)
    flat, nothing = torch.rand(shape) + 1, torch.zeros(shape)
    peaked = torch.rand(shape) ** 16 * 1000  # its scale says nothing
    tokens = tokens_of(heads, 512, torch.stack([flat, peaked, nothing]))
    stays = kept(PrefixKV(), tokens, heads, 300)
    count = stays.sum((1, 2, 3))
    assert 0 < 3 * count[1] < count[0]
    assert count[2] > 0  # without attention all weigh the same
    score = tokens.score.view(stays.shape)
    part = (score * stays).sum((2, 3)) / score.sum((2, 3))  # by row
    assert torch.allclose(part[:2], part[0, 0], atol=0.02)
    assert (score.masked_fill(~stays, 9e9).amin((2, 3)) >= (score * ~stays).amax((2, 3))).all()


def test_layers_of_a_prompt_that_have_lost_tokens_are_judged_as_before() -> None:
    heads, policy = heads_of(3), PrefixKV()
    memo: dict[Any, Any] = {}
    tokens = tokens_of(heads, 512)
    layer = heads.layer(tokens.group)
    whole = policy.steps(tokens, heads, {})[:, 0]
    for number in range(3):
        mine = tokens[layer == number]
        assert torch.allclose(policy.steps(mine, heads, memo)[:, 0], whole[layer == number])
    left = whole > torch.tensor([0.0, 0.2, 0.5])[layer]
    later = policy.steps(tokens[left], heads, memo)[:, 0]
    assert torch.allclose(later, whole[left], atol=1e-3)
    assert policy.steps(tokens[left & (layer == 2)], heads, {})[:, 0].min() < 0.01


def test_retrieval_heads_are_whole_in_the_order_of_the_table() -> None:
    heads = heads_of(2)
    policy = Retrieval(table=((0.1, 0.9), (0.5, 0.3)))
    whole = BATCH * 512 // heads.layout.capacity[-1]
    stays = kept(policy, tokens_of(heads, 512), heads, int(2.5 * whole))
    rows = stays.transpose(1, 2)  # [layers, heads, batch, n]
    assert rows[0, 1].all()
    assert rows[1, 0].all()
    assert not rows[0, 0].any()
    assert (rows[1, 1] == (torch.arange(512) >= 256)).all()
    for shape in ((3, 2), (2, 3)):
        other = dataclasses.replace(heads, layers=shape[0], heads=shape[1])
        with pytest.raises(ConfigError, match=r"2 layers with 2 kv heads.*another model"):
            policy.steps(tokens_of(heads, 8), other, {})


# ---------------------------------------------------------------- whole models


def config_of(name: str, tmp_path: Path) -> skv.Config:
    more: dict[str, Any] = {"retention": name, "bits": 2.0, "recent": 12}
    if name == "retrieval":
        more["retention_table"] = str(tmp_path / "heads.json")
        save_table(more["retention_table"], ((0.1, 0.9), (0.5, 0.3)))
    return skv.Config(**more)


@EACH
def test_a_model_decodes_within_its_bits_eagerly_and_compiled(
    name: str, tmp_path: Path, eager_inner: None
) -> None:
    config, bits = config_of(name, tmp_path), []
    ids, mask = padded_batch(2, 210)
    forced, found = None, []
    for compiled in (False, True):
        model = tiny("llama")
        cache = skv.SphericalCache(model.config, max_cache_len=400, config=config)
        if compiled:
            skv.compile(model, config=config)

        def step(*args: Any, model: Any = model, cache: Any = cache, **kwargs: Any) -> Any:
            out = model(*args, **kwargs)
            if int(cache.get_seq_length()) > 300:
                bits.append(cache.bits_per_coordinate)
            return out

        tokens, logits = greedy(step, cache, ids, mask, 101, forced=forced)
        forced = tokens if forced is None else forced
        found.append((logits, cache.summary()))
    assert counters["stats"]["unique_graphs"] == 1
    assert max_error(found[0][0], found[1][0]) < NATIVE
    assert found[0][1]["tokens_by_tier"] == found[1][1]["tokens_by_tier"]
    assert found[0][1]["tokens_dropped"] > 0
    assert len(bits) > 10
    assert max(bits) <= 2.0


def test_a_head_that_looks_sharply_keeps_more_of_what_nobody_looked_at() -> None:
    """At equal mean attention, the head whose queries each look at one token has a higher floor."""
    queries, n = 16, 64
    sharp = torch.zeros(1, 1, 1, queries, n)
    sharp[0, 0, 0, torch.arange(queries), torch.arange(queries)] = 1.0
    blunt = torch.zeros_like(sharp)
    blunt[..., :queries] = sharp.square().mean(-2, keepdim=True)[..., :queries].sqrt()
    weights = torch.cat([sharp, blunt], 1)
    seen = Seen(weights, torch.ones(1, queries, n, dtype=torch.bool), prompt=True)
    score = POLICIES["rdr"]().observe(seen)
    torch.testing.assert_close(
        score[0, 0, :queries].mean(), score[0, 1, :queries].mean(), rtol=0.2, atol=0
    )
    assert score[0, 0, -1] > 3 * score[0, 1, -1] > 0
    later = POLICIES["rdr"]().observe(Seen(weights, seen.counted, prompt=False))
    assert (later[..., -1] == 0).all()
