"""Every error of the contract: what is wrong, what to do, and nothing stored."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
from support import SMALL, PlainModel, padded_batch, same_state, tiny

import skv_compile as skv
from skv_compile.cache import phantom

LENGTH = 64
EAGER = {"inner": "eager"}


def cache_for(model, codec: str = "grid", **kw):
    return skv.SphericalCache(model.config, max_cache_len=LENGTH, codec=codec, **{**SMALL, **kw})


@torch.no_grad()
def forward(model, cache, ids, **kw):
    return model(ids, past_key_values=cache, **kw).logits


@pytest.fixture
def model():
    return tiny("llama")


@pytest.fixture
def ids():
    return padded_batch(2, 70)[0]


@pytest.fixture
def cache(model, ids):
    """A cache that has seen 40 tokens of two rows."""
    cache = cache_for(model)
    forward(model, cache, ids[:, :40])
    return cache


@contextlib.contextmanager
def refused(cache, kind: type[Exception], *words: str):
    """The block raises ``kind`` with all ``words`` in its message, and the cache stays as it is.

    But for what was due to leave the window anyway: every forward begins with that.
    """
    for keeper in cache.keepers:
        keeper.maintain()
    unchanged = [same_state(state) for state in cache.states]
    seen = int(cache.get_seq_length())
    with pytest.raises(kind) as error:
        yield
    for word in words:
        assert re.search(word, str(error.value)), (word, str(error.value))
    assert all(check() for check in unchanged)
    assert int(cache.get_seq_length()) == seen


def after_errors(model, cache, ids) -> None:
    """The cache still works as if nothing had been tried."""
    twin = cache_for(model)
    forward(model, twin, ids[:, :40])
    assert torch.equal(forward(model, cache, ids[:, 40:50]), forward(model, twin, ids[:, 40:50]))


# ---------------------------------------------------------------- settings


def test_an_unknown_option_is_refused_before_the_model_is_touched(model) -> None:
    with pytest.raises(skv.ConfigError, match=r"'page_size'.*Did you mean 'page_tokens'\?"):
        skv.compile(model, page_size=3)
    assert "forward" not in model.__dict__
    assert "generate" not in model.__dict__
    with pytest.raises(skv.ConfigError, match="'max_lenght'"):
        skv.SphericalCache(model.config, 64, max_lenght=3)


def test_a_head_dim_that_is_not_supported_is_named() -> None:
    odd = tiny("llama", hidden_size=96)
    with pytest.raises(skv.UnsupportedError, match=r"head_dim=24.*supported are 16.*dense cache"):
        skv.SphericalCache(odd.config, 64)
    odd = skv.compile(odd, **SMALL)
    with pytest.raises(skv.UnsupportedError, match="head_dim=24"):
        odd.generate(padded_batch(1)[0], max_new_tokens=4)


def test_a_budget_too_small_for_sinks_and_window_says_what_they_take(model, ids) -> None:
    cache = cache_for(model, budget="1KB")
    with pytest.raises(skv.ConfigError) as error:
        forward(model, cache, ids[:, :10])
    window = 2 * 2 * 2 * 2 * 24 * 16 * 4  # layers, sides, rows, heads, slots, dim, bytes
    for word in ("budget", "window", str(window), "Raise the budget", "max_cache_len"):
        assert word in str(error.value)
    assert cache.states == []


def test_an_encoder_decoder_model_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=16,
        d_ff=16,
        num_layers=1,
        num_heads=1,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    with pytest.raises(skv.UnsupportedError, match="encoder-decoder"):
        skv.compile(model)
    assert "forward" not in model.__dict__


# ---------------------------------------------------------------- what is stored


def test_a_prompt_longer_than_the_cache_is_refused(model, ids) -> None:
    cache = cache_for(model)
    with pytest.raises(skv.CapacityError, match=r"70 tokens.*made for 64.*max_cache_len"):
        forward(model, cache, ids)
    assert int(cache.get_seq_length()) == 0
    forward(model, cache, ids[:, :64])


def test_tokens_beyond_the_cache_are_refused_and_the_rest_stays(model, cache, ids) -> None:
    with refused(cache, skv.CapacityError, "made for 64", "max_cache_len"):
        forward(model, cache, ids[:, 40:66])
    after_errors(model, cache, ids)


def test_a_compiled_step_beyond_the_cache_is_refused(model, ids) -> None:
    step = torch.compile(model, backend="skv", options=EAGER)
    cache = cache_for(model)
    forward(model, cache, ids[:, :63])
    forward(step, cache, ids[:, 63:64])
    with refused(cache, skv.CapacityError, "made for 64", "max_cache_len"):
        forward(step, cache, ids[:, 64:65])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["k_proj", "v_proj"])
@pytest.mark.parametrize("tokens", [1, 10])
def test_keys_or_values_that_are_not_finite_are_named(model, cache, ids, bad, part, tokens) -> None:
    weight = getattr(model.model.layers[1].self_attn, part).weight
    good = weight.clone()
    weight[0] = bad
    name = {"k_proj": "keys", "v_proj": "values"}[part]
    words = ("cache layer 1", "NaN or Inf", name, "row 0", "Nothing was stored", "bfloat16")
    meta = [state.tensors.meta.clone() for state in cache.states]
    dense = [state.dense() for state in cache.states]
    with pytest.raises(skv.NonFiniteError) as error:
        forward(model, cache, ids[:, 40 : 40 + tokens])
    for word in words:
        assert word in str(error.value)
    weight.copy_(good)
    for state, old, (k, v) in zip(cache.states, meta, dense, strict=True):
        assert torch.equal(state.tensors.meta, old)
        assert torch.equal(state.dense()[0], k)
        assert torch.equal(state.dense()[1], v)
    after_errors(model, cache, ids)


# ---------------------------------------------------------------- how it is called


def test_training_mode_is_refused_after_skv_compile(model, cache, ids) -> None:
    model = skv.compile(model, **SMALL).train()
    with refused(cache, skv.UnsupportedError, "training mode", r"model\.eval\(\)"):
        forward(model, cache, ids[:, 40:50])
    after_errors(model.eval(), cache, ids)


def test_attention_dropout_is_refused(ids) -> None:
    model = tiny("llama", attention_dropout=0.5)
    cache = cache_for(model)
    forward(model, cache, ids[:, :40])
    with refused(cache, skv.UnsupportedError, "dropout", r"model\.eval\(\)"):
        forward(model.train(), cache, ids[:, 40:50])
    after_errors(model.eval(), cache, ids)


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("tokens", [1, 10])
def test_a_gradient_is_refused(model, cache, ids, tokens, attached, eager_inner) -> None:
    if attached:
        model = skv.compile(model, **SMALL)
    model.requires_grad_(True)
    words = ("gradient", r"torch\.no_grad\(\)", "dense cache")
    with refused(cache, skv.UnsupportedError, *words):
        model(ids[:, 40 : 40 + tokens], past_key_values=cache)
    after_errors(model, cache, ids)


@pytest.mark.parametrize("grad_later", [False, True])
def test_a_gradient_is_refused_by_the_backend(model, cache, ids, grad_later: bool) -> None:
    """Also when a graph for inference is there already."""
    step = torch.compile(model, backend="skv", options=EAGER)
    model.requires_grad_(True)
    if grad_later:
        twin = cache_for(model)
        forward(model, twin, ids[:, :40])
        forward(step, twin, ids[:, 40:41])
    with refused(cache, Exception, "gradient", r"torch\.no_grad\(\)"):
        step(ids[:, 40:41], past_key_values=cache)
    after_errors(model, cache, ids)


def test_a_gradient_is_refused_for_a_plain_module() -> None:
    model = PlainModel().requires_grad_(True)
    step = torch.compile(model, backend="skv", options={**EAGER, **SMALL})
    with pytest.raises(Exception, match=r"gradient.*torch\.no_grad\(\)"):
        step(torch.zeros(1, 10, dtype=torch.int64), torch.arange(10))
    assert phantom.state_of(model.layers[0].k_cache) is None
    assert model.cache_bytes() == 2 * 2 * 2 * 128 * 16 * 4


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
def test_another_batch_size_is_refused(model, cache, ids, tokens, compiled) -> None:
    step = torch.compile(model, backend="skv", options=EAGER) if compiled else model
    with refused(cache, Exception, "batch|row"):
        forward(step, cache, ids[:1, 40 : 40 + tokens])
    after_errors(model, cache, ids)


def test_another_batch_size_says_what_the_cache_holds(model, cache, ids) -> None:
    with refused(cache, skv.CacheStateError, "holds batch 2", r"given \[1, 2, 5, 16\]", "new"):
        forward(model, cache, ids[:1, 40:45])


def test_another_batch_size_is_refused_by_a_compiled_step_in_our_words(model, cache, ids) -> None:
    model = skv.compile(model, **SMALL)
    with refused(cache, skv.SkvError, "batch"):
        forward(model, cache, ids[:1, 40:41])


def test_a_cache_of_another_model_is_refused(cache, model, ids, eager_inner) -> None:
    one = skv.compile(model, **SMALL)
    other = skv.compile(tiny("qwen2"), **SMALL)
    forward(one, cache, ids[:, 40:41])
    with refused(cache, skv.CacheStateError, "another model", "LlamaForCausalLM", "each model"):
        forward(other, cache, ids[:, 41:42])
    with refused(cache, skv.CacheStateError, "another model"):
        forward(other, cache, ids[:, 41:50])


@pytest.mark.parametrize("compiled", [False, True])
def test_a_cache_of_a_model_of_other_shapes_is_refused(cache, ids, compiled) -> None:
    other = tiny("llama", num_key_value_heads=4)
    step = torch.compile(other, backend="skv", options=EAGER) if compiled else other
    with refused(cache, Exception, "kv heads|heads"):
        forward(step, cache, ids[:, 40:41])


def test_a_cache_in_another_dtype_is_refused(model, cache, ids) -> None:
    with refused(cache, skv.CacheStateError, "float32", "bfloat16", "new SphericalCache"):
        forward(model.bfloat16(), cache, ids[:, 40:41])


def test_offloading_is_refused_with_what_to_use(cache) -> None:
    with refused(cache, skv.UnsupportedError, "offload", "fewer bits"):
        cache.layers[0].offload()


def test_an_eager_write_into_a_phantom_raises(cache) -> None:
    with refused(cache, RuntimeError), torch.no_grad():
        cache.layers[0].keys[:, :, 0] = 1.0


def test_every_error_of_ours_has_one_base_class() -> None:
    for name in skv.__all__:
        if name.endswith("Error"):
            assert issubclass(getattr(skv, name), skv.SkvError)
