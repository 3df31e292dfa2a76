"""Retention on a CUDA device: decisions between replayed steps."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import skv_compile as skv
from skv_compile.retention.tokens import Tokens

from .test_generate_cuda import llama, prompt, settings

TEXT = 500  # tokens of a prompt: several strides


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def kept(cache) -> dict[tuple[int, int], int]:
    """{(group, place): level} of every token that a cache holds."""
    (keeper,) = cache.keepers
    tokens = Tokens.cat(keeper.pool.read(range(keeper.pool.layers), codes=False).tokens)
    names = zip(tokens.group.tolist(), tokens.i.tolist(), strict=True)
    return dict(zip(names, tokens.level.tolist(), strict=True))


def test_generate_decodes_through_cuda_graphs_while_pages_move():
    counters.clear()
    model = llama(torch.bfloat16)
    skv.compile(model, bits=1.5)
    model.generate(**prompt(2, TEXT), **settings(200))
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert counters["stats"]["unique_graphs"] == 1
    (keeper,) = model._skv.cache.keepers
    assert keeper.shelf.refreshes >= 3
    assert keeper.shelf.coded > 0
    assert model._skv.cache.bits_per_coordinate <= 1.5


def test_compiled_decoding_keeps_what_eager_decoding_keeps():
    model = llama()
    text = prompt(2, TEXT)
    eager = skv.SphericalCache(model.config, 768, bits=1.5)
    more = {"return_dict_in_generate": True, "output_logits": True}
    want = model.generate(
        **text, **settings(200), **more, past_key_values=eager, disable_compile=True
    )
    skv.compile(model, bits=1.5)
    graphs = skv.SphericalCache(model.config, 768, bits=1.5)
    got = model.generate(**text, **settings(200), **more, past_key_values=graphs)
    assert torch.equal(got.sequences, want.sequences)
    want_kept, got_kept = kept(eager), kept(graphs)
    same = sum(got_kept.get(token) == level for token, level in want_kept.items())
    assert same >= 0.99 * len(want_kept)  # rounding moves a few tokens across a step
    torch.testing.assert_close(
        torch.stack(got.logits), torch.stack(want.logits), atol=2e-2, rtol=2e-2
    )


def test_identity_with_a_budget_for_everything_is_token_equal_under_every_policy():
    model = llama()
    want = model.generate(**prompt(2, TEXT), **settings(150))
    for name in ("rdr", "streaming", "snapkv", "h2o", "window"):
        torch._dynamo.reset()
        skv.compile(model, codec="identity", retention=name, bits=64)
        assert torch.equal(model.generate(**prompt(2, TEXT), **settings(150)), want), name


def test_a_second_generate_starts_with_an_empty_pool():
    model = llama()
    skv.compile(model, bits=1.5)
    first = model.generate(**prompt(2, TEXT), **settings(100))
    held = model._skv.cache.resident_bytes
    for _ in range(2):
        assert torch.equal(model.generate(**prompt(2, TEXT), **settings(100)), first)
    assert model._skv.cache.resident_bytes == held
