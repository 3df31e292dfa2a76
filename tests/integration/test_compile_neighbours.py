"""Other backends, other passes, options and warnings."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
from support import (
    NATIVE,
    SMALL,
    attention_inputs,
    cached_attention,
    greedy,
    max_error,
    padded_batch,
    tiny,
)
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.nn.attention.flex_attention import flex_attention
from transformers import DynamicCache

import skv_compile as skv
from skv_compile import salt
from skv_compile.backend import SkvBackend
from skv_compile.config import Config

EAGER = {"inner": "eager"}
NEW = 24


def cache_for(model, length: int = 128, codec: str = "identity", **kw):
    return skv.SphericalCache(
        model.config, max_cache_len=length, codec=codec, **{"bits": 64.0, **SMALL, **kw}
    )


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def decode_step(model, **kw):
    return torch.compile(model, backend="skv", options=EAGER, fullgraph=True, **kw)


# ---------------------------------------------------------------- others take part


class Counting(CustomGraphPass):
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph) -> None:
        self.calls += 1

    def uuid(self):
        return "counting"


def test_a_users_inductor_pass_runs_and_stays() -> None:
    user = Counting()
    settings = {"post_grad_custom_pre_pass": user, "force_disable_caches": True}
    with torch._inductor.config.patch(settings):
        torch.compile(cached_attention, backend="skv", options=SMALL)(*attention_inputs())
        assert user.calls == 1
        assert torch._inductor.config.post_grad_custom_pre_pass is user


def test_a_salt_tells_configs_and_other_passes_apart() -> None:
    one, other = Config(), Config(bits=3.0)
    salted = salt.Salted
    assert salted(one).uuid() == salted(Config()).uuid()
    assert salted(one).uuid() != salted(other).uuid()
    assert salted(one, Counting()).uuid() not in (salted(one).uuid(), None)
    assert salted(one, Counting()).uuid() != salted(other, Counting()).uuid()
    # What cannot be named cannot be cached.
    assert salted(one, lambda graph: None).uuid() is None


def test_a_salt_changes_with_our_source(tmp_path, monkeypatch) -> None:
    for folder in ("lowering", "patterns", "codec"):
        (tmp_path / folder).mkdir()
    source = tmp_path / "lowering" / "ops.py"
    source.write_text("x = 1")
    monkeypatch.setattr(salt, "__file__", str(tmp_path / "salt.py"))
    salt.source_hash.cache_clear()
    try:
        before = salt.Salted(Config()).uuid()
        source.write_text("x = 2")
        salt.source_hash.cache_clear()
        assert salt.Salted(Config()).uuid() != before
    finally:
        salt.source_hash.cache_clear()


@pytest.mark.parametrize(
    "backend",
    ["eager", *(pytest.param(x, marks=pytest.mark.slow) for x in ("aot_eager", "inductor"))],
)
def test_a_spherical_cache_under_another_backend_is_right_or_says_why(backend: str) -> None:
    model = tiny("llama")
    ids, mask = padded_batch(2)
    want = greedy(model, cache_for(model), ids, mask, NEW)
    step = torch.compile(model, backend=backend)
    with contextlib.suppress(skv.SkvError):
        got = greedy(step, cache_for(model), ids, mask, NEW)
        assert torch.equal(got[0], want[0])
        assert max_error(got[1], want[1]) < NATIVE


@pytest.mark.parametrize("codec", [pytest.param("identity", marks=pytest.mark.slow), "grid"])
def test_a_cache_may_change_between_backends(codec: str) -> None:
    model = tiny("llama")
    ids, mask = padded_batch(2)
    want = greedy(model, cache_for(model, codec=codec), ids, mask, NEW)
    ours, other = decode_step(model), torch.compile(model, backend="eager")
    turns = iter(range(NEW))

    def step(*args, **kwargs):
        return (ours, other, model)[next(turns) % 3](*args, **kwargs)

    got = greedy(step, cache_for(model, codec=codec), ids, mask, NEW, prefill=model, forced=want[0])
    # Another backend reads decoded keys: sums in another order.
    assert max_error(got[1], want[1]) < NATIVE


# ---------------------------------------------------------------- options, warnings


def test_an_option_by_a_wrong_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(Exception, match=r"unknown option 'bit'.*Did you mean 'bits'\?"):
        torch.compile(cached_attention, backend="skv", options={"bit": 2})(*attention_inputs())


def test_a_mode_by_a_wrong_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(skv.ConfigError, match=r"Did you mean 'reduce-overhead'\?"):
        SkvBackend(mode="reduce-overheads")


def test_inductor_settings_reach_inductor() -> None:
    seen = []
    options = {
        **SMALL,
        "inductor": {"post_grad_custom_post_pass": lambda graph: seen.append(graph)},
    }
    torch.compile(cached_attention, backend="skv", options=options)(*attention_inputs())
    assert len(seen) == 1


def test_a_dynamic_cache_is_a_warning_that_names_what_to_pass(caplog) -> None:
    model = tiny("llama")
    ids, _ = padded_batch(1)
    step = torch.compile(model, backend="skv", options=EAGER)
    cache = DynamicCache(config=model.config)
    with caplog.at_level(logging.WARNING, "skv_compile"), torch.no_grad():
        model(ids, past_key_values=cache)
        step(ids[:, :1], past_key_values=cache)
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("skv_compile")]
    assert len(messages) == 1
    assert "SphericalCache" in messages[0]
    assert "2 attention(s)" in messages[0]


def test_strict_raises_where_an_attention_is_not_rewritten() -> None:
    model = tiny("llama")
    ids, _ = padded_batch(1)
    step = torch.compile(model, backend="skv", options={**EAGER, "strict": True})
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(Exception, match="strict=True") as error:
            step(ids[:, :1], past_key_values=cache)
    inner = getattr(error.value, "inner_exception", error.value)
    assert isinstance(inner, skv.UnsupportedError)


def test_explain_reports_what_the_backend_did_and_changes_nothing() -> None:
    model = tiny("llama")
    ids, _ = padded_batch(1)
    report = skv.explain(model, ids, config=skv.Config(**SMALL))
    assert [site.rewritten for site in report.sites] == [True, True]
    assert "llama" in report.sites[0].where
    assert "2 of 2" in str(report)
    refused = skv.explain(model, ids[:, :1], past_key_values=DynamicCache(config=model.config))
    assert not any(site.rewritten for site in refused.sites)
    assert all("SphericalCache" in site.reason for site in refused.sites)
    assert refused.to_dict()["refused"] == len(refused.sites)


def test_flex_attention_is_refused_by_name(caplog) -> None:
    def step(q, k, v, keys, values, position):
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)

        def seen(score, b, h, i, j):
            return torch.where(j <= position[i], score, -torch.inf)

        return flex_attention(q, keys, values, score_mod=seen)

    given = [torch.randn(1, 2, 3, 16) for _ in range(3)]
    caches = [torch.zeros(1, 2, 8, 16) for _ in range(4)]
    want = step(*given, *caches[:2], torch.arange(3))
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="skv", options={"inner": "eager"}, fullgraph=True)
    got = compiled(*given, *caches[2:], torch.arange(3))
    torch.testing.assert_close(got, want)
    assert "flex_attention" in caplog.text
    torch._dynamo.reset()
    strict = torch.compile(step, backend="skv", options={"strict": True}, fullgraph=True)
    with pytest.raises(Exception, match="attn_implementation='sdpa'"):
        strict(*given, *caches[2:], torch.arange(3))


@pytest.mark.parametrize(
    "given",
    [{"mode": []}, {"options": {"inductor": 3}}, {"options": {"inner": [1]}}],
    ids=str,
)
def test_options_of_another_type_are_refused(given) -> None:
    with pytest.raises(skv.ConfigError, match=r"expected|not known"):
        SkvBackend(**given)


def test_a_cache_of_a_model_names_what_to_pass() -> None:
    with pytest.raises(skv.ConfigError, match=r"Pass model\.config"):
        skv.SphericalCache(tiny("llama"), 64)
