"""Modules, sequences and failures do not leak into one another."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from support import PlainModel, tiny
from transformers import GenerationConfig, StaticCache

import skv_compile as skv
from skv_compile.errors import CacheStateError, ConfigError, UnsupportedError
from skv_compile.lowering.state import FIRST_FRAME

OPTIONS = {"codec": "identity", "recent": 20, "page_tokens": 16, "inner": "eager"}


def plain(seed: int) -> PlainModel:
    model = PlainModel("enable_gqa").eval().requires_grad_(False)
    torch.manual_seed(seed)
    for weight in model.parameters():
        weight.add_(0.1 * torch.randn_like(weight))
    return model


def steps(model, ids, cut):
    out = [model(ids[:, :cut], torch.arange(cut))]
    for n in range(cut, ids.shape[1]):
        out.append(model(ids[:, n : n + 1], torch.tensor([n])))
    return torch.cat(out, 1)


def test_two_instances_that_share_a_graph_have_a_cache_each() -> None:
    ids = torch.randint(0, 64, (1, 40))
    models = [plain(seed) for seed in (0, 1)]
    want = [steps(copy.deepcopy(m), ids, 30) for m in models]
    for model in models:
        model.compile(backend="skv", options=OPTIONS)
    heads = [model(ids[:, :30], torch.arange(30)) for model in models]
    for n in range(30, 40):
        for which, model in enumerate(models):
            heads[which] = torch.cat(
                [heads[which], model(ids[:, n : n + 1], torch.tensor([n]))], dim=1
            )
    for got, exact in zip(heads, want, strict=True):
        assert torch.allclose(got, exact, atol=1e-4)


def test_explain_leaves_the_buffers_of_a_module_as_they_were() -> None:
    ids = torch.randint(0, 64, (1, 20))
    model = plain(0)
    want = steps(copy.deepcopy(model), ids, 10)
    report = skv.explain(model, ids[:, :10], torch.arange(10))
    assert all(site.rewritten for site in report.sites)
    assert len(skv.explain(model, ids[:, :10], torch.arange(10)).sites) == len(report.sites) > 0
    assert torch.equal(steps(model, ids, 10), want)


def test_other_settings_for_a_buffer_that_holds_a_cache_are_refused() -> None:
    ids = torch.randint(0, 64, (1, 20))
    model = plain(0)
    model.compile(backend="skv", options=OPTIONS)
    model(ids, torch.arange(20))
    model.compile(backend="skv", options={**OPTIONS, "codec": "grid"})
    with pytest.raises(Exception, match="already holds a cache"):
        model(ids, torch.arange(20))


def test_a_forward_that_fails_outside_attention_is_taken_back() -> None:
    model = tiny("llama", layers=3).requires_grad_(False)
    ids = torch.randint(0, 64, (1, 60))
    cache = skv.SphericalCache(model.config, 128, codec="identity", recent=20, page_tokens=16)
    exact = StaticCache(config=model.config, max_cache_len=128)
    with torch.no_grad():
        for each in (cache, exact):
            model(ids, past_key_values=each)
        hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids[:, :20], past_key_values=cache)
        hook.remove()
        with pytest.raises(CacheStateError, match="taken back"):
            model(ids[:, :20], past_key_values=cache)
        got = model(ids[:, :20], past_key_values=cache).logits
        want = model(ids[:, :20], past_key_values=exact).logits
    assert torch.allclose(got, want, atol=1e-4)


def test_a_reset_cache_codes_a_short_prompt_as_a_new_one_does() -> None:
    model = tiny("llama").requires_grad_(False)
    long, short = torch.randint(0, 64, (1, 300)), torch.randint(0, 64, (1, 120))
    used, new = (skv.SphericalCache(model.config, 512, bits=2.5) for _ in range(2))
    with torch.no_grad():
        model(long, past_key_values=used)
        used.reset()
        for cache in (used, new):
            model(short, past_key_values=cache)
        a, b = (model(short[:, :8], past_key_values=cache).logits for cache in (used, new))
    assert torch.equal(a, b)


def test_padding_is_no_prompt_to_calibrate_on() -> None:
    model = tiny("llama").requires_grad_(False)
    ids = torch.randint(1, 64, (1, 300))
    mask = torch.ones_like(ids)
    mask[:, :280] = 0
    cache = skv.SphericalCache(model.config, 512, bits=2.5)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    plain_frames = cache.states[0]._frames()
    frames = cache.states[0].tensors[FIRST_FRAME:]
    assert all(torch.equal(a, b) for a, b in zip(frames, plain_frames, strict=True))


def test_a_compiled_model_takes_a_positional_generation_config_and_is_not_copied() -> None:
    model = skv.compile(tiny("llama"), codec="identity")
    ids = torch.randint(1, 64, (1, 20))
    settings = GenerationConfig(max_new_tokens=260, do_sample=False, pad_token_id=0)
    model._skv.compiled = lambda device: model._skv._forward  # the door, not the compiler
    assert model.generate(ids, settings).shape[1] > 256
    with pytest.raises(UnsupportedError, match="cannot be copied or pickled"):
        copy.deepcopy(model)
    with pytest.raises(ConfigError, match="no input"):
        skv.explain(model)
    with pytest.raises(ConfigError, match="reduce-overhead"):
        skv.compile(tiny("llama"), mode="reduce-overhed")


def test_a_compiled_graph_does_not_keep_the_cache_alive_that_it_was_made_with() -> None:
    model = tiny("llama").requires_grad_(False)
    ids = torch.randint(1, 64, (1, 40))
    cache = skv.SphericalCache(model.config, 128, codec="identity")
    compiled = torch.compile(model, backend="skv", options={"inner": "eager"})
    with torch.no_grad():
        model(ids, past_key_values=cache)
        compiled(ids[:, :1], past_key_values=cache)
    state = weakref.ref(cache.states[0])
    del cache
    gc.collect()
    assert state() is None
