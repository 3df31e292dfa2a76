"""With the identity codec, a compressed cache is the dense cache: same tokens, same logits."""

from __future__ import annotations

import pytest
import torch
from support import MODELS, SMALL, generate, greedy, max_error, padded_batch, tiny

import skv_compile as skv

LENGTH, NEW = 128, 64
TOLERANCE = 1e-4  # of fp32 logits of order 1

DOORS = ("backend_name", "model_compile", "skv_compile", "generate_cache")


def exact_cache(model, length: int = LENGTH):
    return skv.SphericalCache(model.config, max_cache_len=length, codec="identity", **SMALL)


def through(door: str, model, ids, mask, inner: str = "eager"):
    """Tokens and logits of 64 greedy steps through one of the doors."""
    if door == "backend_name":
        step = torch.compile(model, backend="skv", options={"inner": inner})
        return greedy(step, exact_cache(model), ids, mask, NEW)
    if door == "model_compile":
        model.compile(backend="skv", options={"inner": inner})
        return greedy(model, exact_cache(model), ids, mask, NEW)
    if door == "skv_compile":
        model = skv.compile(model, codec="identity", **SMALL)
        out = generate(model, ids, mask, NEW)
        # Otherwise this would compare the dense cache with itself.
        assert model._skv.compiled(model.device) is not None
        return out
    assert door == "generate_cache"
    return generate(model, ids, mask, NEW, past_key_values=exact_cache(model))


def assert_equal(got, want) -> None:
    assert torch.equal(got[0], want[0])
    assert max_error(got[1], want[1]) < TOLERANCE


def _cases() -> list:
    """Every door, model and batch; those that differ in nothing that matters only in slow runs."""
    cases = []
    for door in DOORS:
        for name in MODELS:
            for batch in (1, 3):
                compiled = door in ("backend_name", "model_compile")
                soon = name == "llama" and batch == 3
                marks = [pytest.mark.slow] if compiled and not soon else []
                cases.append(pytest.param(door, name, batch, marks=marks))
    return cases


@pytest.mark.parametrize(("door", "name", "batch"), _cases())
def test_identity_is_dense_on_every_model_through_every_door(
    door: str, name: str, batch: int, eager_inner: None
) -> None:
    ids, mask = padded_batch(batch)
    want = generate(tiny(name), ids, mask, NEW)
    got = through(door, tiny(name), ids, mask)
    assert_equal(got, want)


@pytest.mark.parametrize(
    ("door", "name", "batch"),
    [
        ("skv_compile", "llama", 3),
        pytest.param("model_compile", "gemma3", 3, marks=pytest.mark.slow),
        pytest.param("backend_name", "neox", 1, marks=pytest.mark.slow),
        pytest.param("skv_compile", "gpt2", 3, marks=pytest.mark.slow),
        pytest.param("skv_compile", "qwen3", 3, marks=pytest.mark.slow),
    ],
)
def test_identity_is_dense_with_inductor(door: str, name: str, batch: int) -> None:
    ids, mask = padded_batch(batch)
    want = generate(tiny(name), ids, mask, NEW)
    got = through(door, tiny(name), ids, mask, inner="inductor")
    assert_equal(got, want)


@pytest.mark.parametrize("name", MODELS)
def test_every_full_attention_layer_is_rewritten_and_no_other(name: str) -> None:
    model = tiny(name)
    report = skv.explain(model, padded_batch(1)[0][:, :1])
    full = sum(type(x).__name__ == "SphericalLayer" for x in exact_cache(model).layers)
    assert full == (1 if name == "gemma3" else 2)
    assert sum(site.rewritten for site in report.sites) == full
    assert len(report.sites) == 2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_identity_holds_in_bfloat16_up_to_its_rounding(name: str) -> None:
    """The reference computes in fp32, dense attention in bf16: as close as bf16 is to fp32."""
    ids, mask = padded_batch(3)
    exact = generate(tiny(name), ids, mask, 1)[1]
    dense = generate(tiny(name).bfloat16(), ids, mask, 1)[1]
    model = tiny(name).bfloat16()
    got = generate(model, ids, mask, 1, past_key_values=exact_cache(model))[1]
    assert max_error(got, exact) < 2 * max_error(dense, exact)
