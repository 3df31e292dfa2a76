"""The whole path on a CUDA device: generate() with CUDA graphs, flags, and plain modules."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig

import skv_compile as skv

SMALL = {"recent": 20, "page_tokens": 16}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=256,
        max_position_embeddings=8192,
    )
    return AutoModelForCausalLM.from_config(config).eval().to("cuda", dtype)


def prompt(rows=3, length=150):
    torch.manual_seed(1)
    ids = torch.randint(3, 128, (rows, length), device="cuda")
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 20, 37)[:rows]):
        mask[row, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask}


def settings(n=96):
    return {"max_new_tokens": n, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def test_identity_is_token_equal_with_cuda_graphs_and_again_on_a_second_call():
    model = llama()
    want = model.generate(**prompt(), **settings())
    skv.compile(model, codec="identity", **SMALL)
    for _ in range(2):
        assert torch.equal(model.generate(**prompt(), **settings()), want)
    short = {k: v[:, 37:] for k, v in prompt().items()}
    got = model.generate(**short, **settings(40))
    skv.compile(model, codec="identity", mode="default", **SMALL)
    assert torch.equal(model.generate(**short, **settings(40)), got)


def test_identity_is_token_equal_through_generates_own_compilation():
    model = llama()
    want = model.generate(**prompt(), **settings())
    for _ in range(2):
        cache = skv.SphericalCache(model.config, 256, codec="identity", **SMALL)
        got = model.generate(
            **prompt(),
            **settings(),
            past_key_values=cache,
            compile_config=CompileConfig(backend="skv"),
        )
        assert torch.equal(got, want)


def test_a_model_that_never_met_us_works_with_generates_default_compilation():
    model = llama()
    want = model.generate(**prompt(), **settings(24))
    cache = skv.SphericalCache(model.config, 256, codec="identity", **SMALL)
    got = model.generate(**prompt(), **settings(24), past_key_values=cache)
    assert torch.equal(got, want)


def test_compiled_grid_equals_the_eager_reference_on_the_same_device():
    model = llama()
    eager = skv.SphericalCache(model.config, 256, bits=2.5, retention="none", **SMALL)
    want = model.generate(**prompt(), **settings(), past_key_values=eager, disable_compile=True)
    skv.compile(model, bits=2.5, retention="none", **SMALL)
    got = model.generate(**prompt(), **settings())
    assert (got == want).float().mean() > 0.99  # ties of a random model may fall either way
    state, other = model._skv.cache.states[0].tensors, eager.states[0].tensors
    assert torch.equal(state.meta, other.meta)


def test_nan_is_flagged_and_raised_and_nothing_is_stored():
    model = llama()
    skv.compile(model, codec="identity", **SMALL)
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(skv.SkvError, match="NaN or Inf"):
        model.generate(**prompt(), **settings(8))


def test_compressed_memory_is_what_is_allocated():
    model = llama(torch.bfloat16)

    def allocated(tokens: int) -> skv.SphericalCache:
        cache = skv.SphericalCache(model.config, tokens, bits=2.2)
        cache.early_initialization(1, 2, 64, torch.bfloat16, torch.device("cuda"))
        return cache

    allocated(256)  # makes the constants that all caches of a process share
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    cache = allocated(65536)
    grown = torch.cuda.memory_allocated() - before
    assert grown <= cache.resident_bytes * 1.02 + 65536
    assert cache.resident_bytes < cache.dense_bytes / 6
