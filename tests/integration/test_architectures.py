"""Models that are built unlike Llama: what is rewritten, what is refused, and in which words."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from support import SMALL, PlainModel, generate, padded_batch, tiny
from transformers import AutoModelForCausalLM, Gemma4TextConfig
from zoo.tiny import build

import skv_compile as skv
from skv_compile.commands.calibrate import Calibration
from skv_compile.commands.tune import _layer_config
from skv_compile.integrations.hf import attention_of

EXACT = {"codec": "identity", **SMALL}


def gemma4(**kw: Any) -> Any:
    """A sliding layer of head dim 16 before a full one of 32."""
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "global_head_dim": 32}
    small = {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8}
    types = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    torch.manual_seed(0)
    config = Gemma4TextConfig(
        **{
            **sizes,
            **heads,
            **small,
            **types,
            "num_kv_shared_layers": 0,
            "sliding_window": 16,
            **kw,
        },
        initializer_range=0.15,
        eos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def said(caplog: Any) -> list[str]:
    """Warnings of the attachment, without those of the backend."""
    return [r.getMessage() for r in caplog.records if r.name.endswith("integrations.hf")]


def same_tokens(model: Any) -> None:
    """After skv.compile, generate() gives the tokens and logits of a dense cache."""
    ids, mask = padded_batch(2)
    want = generate(model, ids, mask, 24)
    skv.compile(model, **EXACT)
    got = generate(model, ids, mask, 24)
    assert torch.equal(got[0], want[0])
    assert (got[1] - want[1]).abs().max() < 1e-3 * want[1].std()


# ---------------------------------------------------------------- layers unlike one another


def test_layers_of_several_head_dims(eager_inner: None) -> None:
    same_tokens(gemma4())
    report = skv.explain(gemma4(), padded_batch(1)[0][:, :1])
    assert [(site.code, site.head_dim) for site in report.sites] == [("sliding", 0), ("", 32)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"global_head_dim": 512}, "head_dim=512 is not supported"),
        (
            {
                "num_hidden_layers": 4,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "num_kv_shared_layers": 2,
            },
            r"full-attention layers \(3\) read the keys and values of an earlier layer",
        ),
    ],
)
def test_layers_that_cannot_be_compressed(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(skv.UnsupportedError, match=words):
        skv.SphericalCache(gemma4(**settings).config, 64)


def test_frames_are_not_calibrated_for_layers_of_several_shapes() -> None:
    config = skv.Config(retention="none", bits=64.0)
    with pytest.raises(skv.UnsupportedError, match="layers of several shapes"):
        Calibration(gemma4(), [list(range(40))], [config], every_tier=True)


def test_tuning_takes_the_shape_of_the_compressed_layers() -> None:
    own = _layer_config(skv.SphericalCache(gemma4().config, 64, **EXACT))
    assert (own.head_dim, own.num_key_value_heads) == (32, 2)


def test_explain_sees_the_heads_of_each_layer() -> None:
    """MiMo's sliding layers have more kv heads, under a name of their own."""
    report = skv.explain(build("MiMoV2FlashForCausalLM"), padded_batch(1)[0][:, :1])
    assert {site.code for site in report.sites} == {"sliding", "scores"}


@pytest.mark.parametrize("name", ["JambaForCausalLM", "NemotronHForCausalLM"])
def test_layers_without_keys_are_counted(name: str) -> None:
    model = build(name)
    cache = skv.SphericalCache(model.config, 64, **EXACT)
    model(padded_batch(1)[0], past_key_values=cache)
    states = [x for layer in cache.layers for x in getattr(layer, "conv_states", {}).values()]
    assert sum(x.nbytes for x in states) > 0
    assert cache.dense_bytes > cache.states[0].dense_bytes
    assert cache.summary()["compressed_layers"] == 1


# ---------------------------------------------------------------- what no cache can be made for


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("FalconH1ForCausalLM", r"layers that are not supported: LinearAttentionAndStaticFull"),
        ("DeepseekV32ForCausalLM", r"StaticIndexedLayer \(attention to tokens that an index"),
        ("MoshiForCausalLM", r"nothing to compress: StaticSlidingWindowLayer \(a sliding window"),
        ("MambaForCausalLM", r"nothing to compress: LinearAttentionLayer"),
        ("DeepseekV4ForCausalLM", r"'heavily_compressed_attention', for which transformers has no"),
        ("OpenAIGPTLMHeadModel", r"forward\(\) takes no past_key_values"),
        ("MiniMaxForCausalLM", r"a cache class of its own"),
    ],
)
def test_compile_refuses_what_generate_would(name: str, words: str) -> None:
    model = build(name)
    for refuses in (skv.compile, lambda model: skv.explain(model, padded_batch(1)[0])):
        with pytest.raises(skv.UnsupportedError, match=words):
            refuses(model)
    assert "forward" not in model.__dict__


# ---------------------------------------------------------------- implementations of attention


def test_attention_by_hand_is_compiled(eager_inner: None, caplog) -> None:
    model = tiny("llama")
    model.set_attn_implementation("eager")
    with caplog.at_level(logging.WARNING, "skv_compile"):
        same_tokens(model)
    # The identity codec runs on the reference, which is said once in a process.
    assert {r.name.rpartition(".")[2] for r in caplog.records} <= {"kernels"}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_the_attention_of_a_decoder_inside_counts(eager_inner: None) -> None:
    model = build("GotOcr2ForConditionalGeneration")
    assert model.config._attn_implementation != attention_of(model) == "sdpa"
    same_tokens(model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Gemma2ForCausalLM", "tanh"),  # a soft cap of the scores
        ("BloomForCausalLM", "no attention is found"),  # baddbmm, of three axes
        ("RoFormerForCausalLM", "symbols"),  # not one graph
    ],
)
def test_attention_that_is_not_rewritten_is_a_warning(
    name: str, reason: str, eager_inner: None, caplog
) -> None:
    with caplog.at_level(logging.WARNING, "skv_compile"):
        same_tokens(build(name))
    (message,) = said(caplog)
    assert "'eager' cannot be compiled" in message
    assert reason in message
    assert "skv.explain" in message  # these have no sdpa to ask for
    strict = skv.compile(build(name), strict=True, **EXACT)
    with pytest.raises(Exception, match=reason) as error:
        strict.generate(padded_batch(1)[0], max_new_tokens=4)
    assert isinstance(error.value, skv.UnsupportedError) or name == "RoFormerForCausalLM"


def test_attention_of_a_kernel_is_a_warning_at_once(caplog) -> None:
    model = tiny("llama")
    model.set_attn_implementation("flex_attention")
    with caplog.at_level(logging.WARNING, "skv_compile"):
        skv.compile(model, bits=3.0)
    (message,) = said(caplog)
    assert "'flex_attention' is not one that the pass can rewrite" in message
    assert 'attn_implementation="sdpa"' in message
    assert "retention='none'" in message
    with pytest.raises(skv.UnsupportedError, match=r'strict=True.*attn_implementation="sdpa"'):
        skv.compile(model, strict=True)


def test_attention_weights_are_not_compiled_and_it_is_said(eager_inner: None, caplog) -> None:
    model = tiny("llama")
    model.set_attn_implementation("eager")
    skv.compile(model, **EXACT)
    ids, mask = padded_batch(1)
    with caplog.at_level(logging.WARNING, "skv_compile"):
        for _ in range(2):
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=3,
                output_attentions=True,
                return_dict_in_generate=True,
            )
    assert len(out.attentions) == 3
    (message,) = said(caplog)
    assert "output_attentions" in message


# ---------------------------------------------------------------- explain


def test_explain_says_why_where_the_graph_is_refused_as_a_whole() -> None:
    ids = padded_batch(1)[0][:, :1]
    report = skv.explain(build("DiffLlamaForCausalLM"), ids)
    assert report.sites
    assert not any(site.rewritten for site in report.sites)
    assert "values are not" in str(report)


def test_explain_raises_our_error_where_there_is_no_attention_to_blame() -> None:
    """A module whose buffers hold a cache already, looked at with other settings."""
    model, ids = PlainModel(), padded_batch(1)[0]
    torch.compile(model, backend="skv", options={"inner": "eager", **EXACT})(ids, torch.arange(40))
    with pytest.raises(skv.ConfigError, match="this buffer already holds a cache"):
        skv.explain(model, ids[:, :1], torch.tensor([40]), config=skv.Config(bits=3.0))
