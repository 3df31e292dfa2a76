"""The matcher on real Hugging Face models, small and random."""

from __future__ import annotations

import pytest
import torch
from test_patterns_capture import capture
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

from skv_compile.patterns import Match, match

SLOTS, WINDOW, LAYERS = 16, 4, 2
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}
GPT2_SIZES = {"vocab_size": 128, "n_embd": 64, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}

# model class, config, key/value heads
MODELS: dict[str, tuple[type[PreTrainedModel], PreTrainedConfig, int]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**GROUPED), 2),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**GROUPED), 2),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**GROUPED), 2),
    "mistral": (MistralForCausalLM, MistralConfig(**GROUPED, sliding_window=None), 2),
    "gpt2": (GPT2LMHeadModel, GPT2Config(**GPT2_SIZES), 4),
    "neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**SIZES), 4),
    "phi": (PhiForCausalLM, PhiConfig(**SIZES), 4),
}
GEMMA = Gemma3TextConfig(
    **{**GROUPED, "num_hidden_layers": 3},
    sliding_window=WINDOW,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
)


def static_cache(config: PreTrainedConfig, kv_heads: int, slots: int = SLOTS) -> StaticCache:
    cache = StaticCache(config=config, max_cache_len=slots)
    cache.early_initialization(1, kv_heads, 16, torch.float32, torch.device("cpu"))
    return cache


def ids(count: int) -> torch.Tensor:
    return torch.arange(count)[None]


def match_model(model: PreTrainedModel, count: int, **kwargs) -> Match:
    return match(capture(model.eval(), ids(count), **kwargs))


@pytest.mark.parametrize("count", [1, 5], ids=["decode", "prefill"])
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_with_a_static_cache_is_a_site(name: str, count: int) -> None:
    model_class, config, kv_heads = MODELS[name]
    cache = static_cache(config, kv_heads)
    found = match_model(model_class(config), count, past_key_values=cache)
    assert (found.refusals, found.plain) == ((), ())
    assert [site.index for site in found.sites] == list(range(LAYERS))
    for site in found.sites:
        assert (site.key.spelling, site.value.spelling) == ("index_copy", "index_copy")
        assert f"layers_{site.index}_keys" in site.key.cache.name
        assert f"layers_{site.index}_values" in site.value.cache.name
        assert site.key.source.meta["example_value"].shape == (1, kv_heads, count, 16)
        assert site.group_size == 4 // kv_heads
        assert site.gqa == ("none" if kv_heads == 4 else "expand_reshape")
        assert len(site.views) == (0 if kv_heads == 4 else 6)
        assert site.masks
        assert not site.is_causal
        assert site.read_end is None
        assert site.scale == pytest.approx(0.25)
        assert site.where.startswith("transformers/models/")
        assert site.where.endswith("in forward")


def test_a_second_cache_length_makes_it_symbolic_and_still_matches() -> None:
    model_class, config, _ = MODELS["llama"]
    graphs = []

    def backend(gm, _inputs):
        graphs.append(gm.graph)
        return gm.forward

    model = torch.compile(model_class(config).eval(), backend=backend, fullgraph=True)
    with torch.no_grad():
        for slots in (SLOTS, 2 * SLOTS):
            model(ids(1), past_key_values=static_cache(config, 2, slots))
    first, second = (match(graph).sites for graph in graphs)
    assert len(first) == len(second) == LAYERS
    assert isinstance(second[0].key.cache.meta["example_value"].shape[2], torch.SymInt)


@pytest.mark.parametrize("past", [0, 3], ids=["empty", "filled"])
def test_a_dynamic_cache_is_refused_by_name(past: int) -> None:
    model_class, config, _ = MODELS["llama"]
    model, cache = model_class(config), DynamicCache(config=config)
    if past:
        with torch.no_grad():
            model(ids(past), past_key_values=cache)
    found = match_model(model, 1, past_key_values=cache)
    assert (found.sites, found.plain) == ((), ())
    assert [refusal.code for refusal in found.refusals] == ["dynamic-cat"] * LAYERS
    assert "SphericalCache" in found.refusals[0].reason


def test_without_a_cache_every_attention_is_plain() -> None:
    for name in ("llama", "gpt2"):
        model_class, config, _ = MODELS[name]
        found = match_model(model_class(config), 5, use_cache=False)
        assert (found.sites, found.refusals) == ((), ())
        assert len(found.plain) == LAYERS


# How full the sliding layers are, and how many tokens come: each takes another way through them.
@pytest.mark.parametrize(
    ("past", "count"),
    [
        pytest.param(0, 1, id="first"),
        pytest.param(0, WINDOW, id="fills"),
        pytest.param(0, WINDOW + 2, id="overflows"),
        pytest.param(2, WINDOW, id="fills-and-overflows", marks=pytest.mark.slow),
        pytest.param(WINDOW, 1, id="full"),
        pytest.param(WINDOW, 3, id="full-many", marks=pytest.mark.slow),
    ],
)
def test_sliding_layers_stay_dense_and_full_ones_are_sites(past: int, count: int) -> None:
    model, cache = Gemma3ForCausalLM(GEMMA).eval(), static_cache(GEMMA, 2)
    if past:
        with torch.no_grad():
            model(ids(past), past_key_values=cache)
    found = match_model(model, count, past_key_values=cache)
    assert [site.index for site in found.sites] == [1]
    assert [refusal.code for refusal in found.refusals] == ["sliding", "sliding"]
    assert found.plain == ()


def test_a_window_longer_than_the_cache_never_slides() -> None:
    config = Gemma3TextConfig(**{**GEMMA.to_dict(), "sliding_window": 4 * SLOTS})
    found = match_model(Gemma3ForCausalLM(config), 1, past_key_values=static_cache(config, 2))
    assert [site.index for site in found.sites] == [0, 1, 2]
