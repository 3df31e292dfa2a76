"""Modules that are no transformers model: registered cache buffers in the style of gpt-fast."""

from __future__ import annotations

import pytest
import torch
from support import SMALL, VOCAB, PlainModel, max_error, plain_greedy
from torch.nn.functional import scaled_dot_product_attention

import skv_compile as skv
from skv_compile.cache import phantom

SETTINGS = {"codec": "identity", **SMALL}
NEW = 64
TOLERANCE = 1e-4

GQA = pytest.mark.parametrize("gqa", ["enable_gqa", "repeat_interleave"])


def prompt(batch: int = 1, width: int = 40) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, width), generator=torch.Generator().manual_seed(3))


def through(door: str, gqa: str, batch: int = 1, inner: str = "eager", **settings):
    """(a callable, the module behind it)."""
    settings = settings or SETTINGS
    options = {"inner": inner, **settings}
    if door == "class":

        @skv.compile(**settings)
        class Decorated(PlainModel):
            pass

        model = Decorated(gqa, batch=batch)
        return model, model
    model = PlainModel(gqa, batch=batch)
    if door == "backend_name":
        return torch.compile(model, backend="skv", options=options), model
    if door == "model_compile":
        model.compile(backend="skv", options=options)
        return model, model
    if door == "instance":
        assert skv.compile(model, **settings) is model
        return model, model
    assert door == "function"

    @skv.compile(**settings)
    def step(ids, input_pos):
        return model(ids, input_pos)

    return step, model


DOORS = pytest.mark.parametrize(
    "door", ["backend_name", "model_compile", "instance", "class", "function"]
)


@GQA
@DOORS
def test_identity_is_dense_through_every_door(door: str, gqa: str, eager_inner: None) -> None:
    want = plain_greedy(PlainModel(gqa), prompt(), NEW)
    step, model = through(door, gqa)
    got = plain_greedy(step, prompt(), NEW)
    assert torch.equal(got[0], want[0])
    assert max_error(got[1], want[1]) < TOLERANCE
    assert all(phantom.state_of(layer.k_cache) is not None for layer in model.layers)


@GQA
def test_identity_is_dense_for_a_batch_of_rows(gqa: str) -> None:
    want = plain_greedy(PlainModel(gqa, batch=3), prompt(3), NEW)
    step, _ = through("backend_name", gqa, batch=3)
    got = plain_greedy(step, prompt(3), NEW)
    assert torch.equal(got[0], want[0])
    assert max_error(got[1], want[1]) < TOLERANCE


@pytest.mark.parametrize(
    ("door", "gqa"),
    [
        ("instance", "enable_gqa"),
        pytest.param("backend_name", "repeat_interleave", marks=pytest.mark.slow),
    ],
)
def test_identity_is_dense_with_inductor(door: str, gqa: str) -> None:
    want = plain_greedy(PlainModel(gqa), prompt(), NEW)
    step, _ = through(door, gqa, inner="inductor")
    got = plain_greedy(step, prompt(), NEW)
    assert torch.equal(got[0], want[0])
    assert max_error(got[1], want[1]) < TOLERANCE


@DOORS
def test_the_memory_of_the_buffers_is_gone_after_the_first_step(door, eager_inner) -> None:
    step, model = through(door, "enable_gqa", bits=3.0, **SMALL)
    layers, dense = len(model.layers), model.cache_bytes()
    assert dense == layers * 2 * 2 * 128 * 16 * 4
    with torch.no_grad():
        step(prompt(), torch.arange(40))
    assert model.cache_bytes() <= layers * 2 * 4
    states = [phantom.state_of(layer.k_cache) for layer in model.layers]
    assert all(layer.k_cache.shape == (1, 2, 128, 16) for layer in model.layers)
    assert sum(state.dense_bytes for state in states) == dense
    held = [x for s in states for x in s.tensors[:7]]  # layers share a pool
    assert sum({x.data_ptr(): x.nbytes for x in held}.values()) < dense / 2


@pytest.mark.parametrize("codec", ["identity", "grid"])
def test_a_prompt_that_was_prefilled_eagerly_is_kept(codec: str) -> None:
    want = plain_greedy(PlainModel(), prompt(), NEW)
    model = PlainModel()
    step = torch.compile(model, backend="skv", options={"inner": "eager", **SMALL, "codec": codec})
    got = plain_greedy(step, prompt(), NEW, prefill=model)
    state = phantom.state_of(model.layers[0].k_cache)
    assert state.tensors.meta[0, :2].tolist() == [0, 40 + NEW - 1]
    assert torch.equal(got[1][:, 0], want[1][:, 0])
    if codec == "identity":
        assert torch.equal(got[0], want[0])
        assert max_error(got[1], want[1]) < TOLERANCE
    else:  # close, and not by accident
        error = (got[1][:, 1] - want[1][:, 1]).norm() / want[1][:, 1].norm()
        assert 0 < error < 0.5


def test_a_second_sequence_from_position_zero_forgets_the_first() -> None:
    step, model = through("backend_name", "enable_gqa")
    plain_greedy(step, prompt(), 20)
    other = prompt().flip(-1)
    got = plain_greedy(step, other, NEW)
    want = plain_greedy(PlainModel(), other, NEW)
    assert torch.equal(got[0], want[0])
    assert max_error(got[1], want[1]) < TOLERANCE
    assert phantom.state_of(model.layers[0].k_cache).tensors.meta[0, 1] == 40 + NEW - 1


def test_a_step_that_goes_back_within_the_window_rewrites_it() -> None:
    """Speculative decoding: write tokens, reject the last ones, write others."""
    step, _ = through("backend_name", "enable_gqa")
    dense = PlainModel()
    wrong, right = prompt(width=50).flip(-1), prompt(width=60)
    with torch.no_grad():
        for run in (step, dense):
            run(right[:, :40], torch.arange(40))
            run(wrong[:, 40:45], torch.arange(40, 45))
        got = step(right[:, 42:48], torch.arange(42, 48))
        want = dense(right[:, 42:48], torch.arange(42, 48))
    assert max_error(got, want) < TOLERANCE


def test_a_function_with_the_cache_as_arguments_is_rewritten() -> None:
    def attention(q, k, v, keys, values, input_pos, mask):
        keys[:, :, input_pos] = k
        values[:, :, input_pos] = v
        return scaled_dot_product_attention(q, keys, values, attn_mask=mask)

    keys, values = torch.zeros(2, 1, 2, 64, 16).unbind()
    keys, values = keys.clone(), values.clone()
    dense = keys.clone(), values.clone()
    step = torch.compile(
        attention, backend="skv", options={"inner": "eager", **SETTINGS}, fullgraph=True
    )
    for t in range(50):
        q, k, v = torch.randn(3, 1, 2, 1, 16).unbind()
        mask = (torch.arange(64) <= t)[None, None, None]
        arguments = (torch.tensor([t]), mask)
        got = step(q, k, v, keys, values, *arguments)
        want = attention(q, k, v, *dense, *arguments)
        assert max_error(got, want) < 1e-5
    assert phantom.state_of(keys) is not None
    assert keys.untyped_storage().nbytes() == 4


def test_a_subclass_of_a_decorated_class_is_left_alone(eager_inner: None) -> None:
    @skv.compile(**SETTINGS)
    class Base(PlainModel):
        pass

    class Derived(Base):
        pass

    assert Base()._compiled_call_impl is not None
    assert Derived()._compiled_call_impl is None


def test_what_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(skv.ConfigError, match=r"expected a torch\.nn\.Module"):
        skv.compile(42)


def test_a_stray_read_of_a_rewritten_buffer_is_not_a_number() -> None:
    step, model = through("backend_name", "enable_gqa")
    with torch.no_grad():
        step(prompt(), torch.arange(40))
    buffer = model.layers[0].k_cache
    assert torch.isnan(buffer.sum())
    with pytest.raises(RuntimeError):
        buffer[:, :, 0] = 1
