"""generate() under what it should not meet: the right tokens, or an error that says what to do.

A cache that has been through any of it works again: at once, or after ``reset``.
"""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support import SMALL, VOCAB, padded_batch, tiny
from torch import Tensor
from transformers import LogitsProcessor

import skv_compile as skv
from skv_compile.errors import CacheStateError, CapacityError, ConfigError, NonFiniteError

from .calls import EXAMPLES, Refused, attempt

WHERE = "test_generate"
LENGTH, NEW = 96, 6
PHASES = (Phase.explicit, Phase.generate)
HOW = {
    "identity": {"codec": "identity", **SMALL},
    "grid": {"codec": "grid", "bits": 4.0, **SMALL},
    "rdr": {"codec": "frame", "bits": 3.0, **SMALL, "retention": "rdr"},
}
SLOW = [pytest.param("grid", marks=pytest.mark.slow), pytest.param("rdr", marks=pytest.mark.slow)]
WAYS = pytest.mark.parametrize("how", HOW)
MOST_WAYS = pytest.mark.parametrize("how", ["identity", *SLOW])  # of tests with many cases


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return padded_batch(2, 40)[0].clamp(min=1)


def cache_for(model: Any, how: str, length: int = LENGTH, **kw: Any) -> Any:
    return skv.SphericalCache(model.config, length, skv.Config(**{**HOW[how], **kw}))


def generate(model: Any, ids: Tensor, cache: Any = None, new: int = NEW, **kw: Any) -> Tensor:
    kw = {"do_sample": False, "attention_mask": torch.ones_like(ids), **kw}
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, **kw)


def fresh(model: Any, ids: Tensor, how: str, **kw: Any) -> Tensor:
    """What an untroubled cache of ``tiny("llama")`` generates."""
    key = (how, tuple(ids.shape), tuple(ids.flatten().tolist()), tuple(kw.items()))
    if key not in _FRESH:
        _FRESH[key] = generate(model, ids, cache_for(model, how), **kw)
    return _FRESH[key]


_FRESH: dict[Any, Tensor] = {}


@contextmanager
def hooked(module: Any, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def after_reset(model: Any, ids: Tensor, cache: Any, how: str) -> None:
    cache.reset()
    assert torch.equal(attempt(WHERE, generate, model, ids, cache), fresh(model, ids, how))


# ---------------------------------------------------------------- any prompt


@settings(max_examples=EXAMPLES or 12, phases=PHASES)
@given(st.integers(1, 3), st.integers(1, 60), st.integers(1, 12), st.integers(0, 2**31), st.data())
def test_any_prompt_gives_the_tokens_of_a_dense_cache(
    batch: int, width: int, new: int, seed: int, data: st.DataObject
) -> None:
    model = small()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (batch, width), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : data.draw(st.integers(0, width - 1))] = 0
    kw: dict[str, Any] = {"attention_mask": mask}
    if data.draw(st.booleans()):
        kw["prefill_chunk_size"] = data.draw(st.integers(1, width))
    if data.draw(st.booleans()):
        kw["num_beams"] = 2
    want = attempt(WHERE, generate, model, ids, None, new, also=(Exception,), **kw)
    found = attempt(
        WHERE, generate, model, ids, cache_for(model, "identity"), new, also=(Exception,), **kw
    )
    if isinstance(want, Refused):
        assert isinstance(found, Refused)
    else:
        assert torch.equal(found, want)


def small() -> Any:
    """No fixture: hypothesis would print it."""
    if not _MODELS:
        _MODELS.append(tiny("llama"))
    return _MODELS[0]


_MODELS: list[Any] = []


@WAYS
@pytest.mark.parametrize("shape", [(1, 0), (2, 0), (0, 5), (0, 0)])
def test_a_prompt_of_nothing_does_what_it_does_without_us(model, how: str, shape) -> None:
    """As with the model's own cache, or refused; and the cache is as good as before."""
    nothing, ids = torch.zeros(shape, dtype=torch.int64), padded_batch(1, 20)[0]
    cache = cache_for(model, how)
    with torch.no_grad():
        want = attempt(WHERE, model, nothing, use_cache=True, also=(Exception,))
        found = attempt(WHERE, model, nothing, past_key_values=cache, also=(Exception,))
    if not isinstance(found, Refused):
        assert not isinstance(want, Refused)
        assert found.logits.shape == want.logits.shape
        assert int(cache.get_seq_length()) == 0
    elif not isinstance(want, Refused):
        assert isinstance(found.error, skv.SkvError)
    found = attempt(WHERE, generate, model, nothing, cache_for(model, how), also=(Exception,))
    want = attempt(WHERE, generate, model, nothing, also=(Exception,))
    if isinstance(want, Refused):
        assert isinstance(found, Refused)
    elif isinstance(found, Refused):
        assert isinstance(found.error, skv.SkvError)
    else:
        assert torch.equal(found, want)
    assert torch.equal(generate(model, ids, cache), fresh(model, ids, how))


@MOST_WAYS
@pytest.mark.parametrize(("width", "new"), [(97, 1), (200, 5), (96, 2), (90, 20), (95, 3)])
def test_more_tokens_than_the_cache_holds_are_refused(model, ids, how, width, new) -> None:
    long = padded_batch(2, width)[0].clamp(min=1)
    cache = cache_for(model, how)
    found = attempt(WHERE, generate, model, long, cache, new, also=(ValueError,))
    assert isinstance(found, Refused)
    assert isinstance(found.error, CapacityError)
    assert "max_cache_len" in found.text
    after_reset(model, ids, cache, how)


# ---------------------------------------------------------------- budgets


@pytest.mark.parametrize("retention", ["none", "rdr"])
@pytest.mark.parametrize("codec", ["identity", "grid", "frame"])
def test_any_budget_is_kept_or_refused(model, ids, codec: str, retention: str) -> None:
    settings = {**SMALL, "codec": codec, "retention": retention, "bits": 64.0}
    dense = skv.SphericalCache(model.config, LENGTH, **settings)
    want = generate(model, ids, dense)
    for size in (0, -1, 1, 20_000, 200_000, "1000TB", 2**63 - 1, 2**63):
        cache = attempt(WHERE, skv.SphericalCache, model.config, LENGTH, budget=size, **settings)
        if isinstance(cache, Refused):
            assert size in (0, -1, 2**63)
            continue
        found = attempt(WHERE, generate, model, ids, cache)
        if isinstance(found, Refused):
            assert isinstance(found.error, ConfigError)
            assert isinstance(size, int)
            assert size <= 20_000
            assert str(size) in found.text
            assert cache.resident_bytes == 0
            continue
        assert cache.resident_bytes <= cache.config.budget_bytes
        if isinstance(size, str) or size > 10**6:
            assert retention == "rdr" or torch.equal(found, want)


def test_a_budget_of_nothing_is_refused_before_the_model_is_touched(model) -> None:
    for size in (0, "0", "0.4", "-1GB", float("nan"), float("inf")):
        found = attempt(WHERE, skv.compile, model, budget=size)
        assert isinstance(found, Refused)
        assert "forward" not in model.__dict__


# ---------------------------------------------------------------- activations


@MOST_WAYS
@pytest.mark.parametrize("bad", [torch.nan, pytest.param(torch.inf, marks=pytest.mark.slow), 1e38])
@pytest.mark.parametrize("part", ["k_proj", "v_proj", "q_proj", "layer"])
@pytest.mark.parametrize("when", [0, 3])
def test_a_bad_activation_is_named_or_passes(model, ids, how, bad, part, when) -> None:
    """In keys and values it is refused; elsewhere the model goes on with it. Nothing stays."""
    layer = model.model.layers[1] if part != "layer" else model.model.layers[0]
    module = layer if part == "layer" else getattr(layer.self_attn, part)
    calls = [0]

    def spoil(_: Any, __: Any, out: Any) -> Any:
        calls[0] += 1
        if calls[0] == when + 1:
            (out[0] if isinstance(out, tuple) else out)[-1, -1, ::3] = bad
        return out

    cache = cache_for(model, how)
    with hooked(module, spoil):
        found = attempt(WHERE, generate, model, ids, cache)
    if part in ("k_proj", "v_proj") and bad != 1e38:
        assert isinstance(found, Refused)
        assert isinstance(found.error, NonFiniteError)
        assert "cache layer 1" in found.text
        # The forward that failed is gone: what it was to bring can be brought again.
        assert int(cache.get_seq_length()) == (0 if when == 0 else ids.shape[1] + when - 1)
        done = ids if when == 0 else fresh(model, ids, how, new=when)
        assert torch.equal(
            attempt(WHERE, generate, model, done, cache, NEW - when), fresh(model, ids, how)
        )
    else:
        assert not isinstance(found, Refused) or isinstance(found.error, NonFiniteError)
        if not isinstance(found, Refused):  # rows do not see each other
            assert torch.equal(found[0], fresh(model, ids, how)[0]) or how == "rdr"
    after_reset(model, ids, cache, how)


# ---------------------------------------------------------------- dtypes


@MOST_WAYS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [1, 5])
def test_another_dtype_between_forwards_is_refused(ids, how, dtype, tokens: int) -> None:
    model = tiny("llama")
    cache, twin = cache_for(model, how), cache_for(model, how)
    more = ids[:, :tokens]
    with torch.no_grad():
        for each in (cache, twin):
            model(ids, past_key_values=each)
        found = attempt(WHERE, copy.deepcopy(model).to(dtype), more, past_key_values=cache)
        assert isinstance(found, Refused)
        assert isinstance(found.error, CacheStateError)
        assert str(dtype) in found.text
        want = model(more, past_key_values=twin).logits
        assert torch.equal(model(more, past_key_values=cache).logits, want)


# ---------------------------------------------------------------- interruptions


class Stop(LogitsProcessor):
    """An interruption between two forwards."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return scores


def interrupted(model: Any, ids: Tensor, cache: Any, place: str, at: int) -> None:
    """A generate() that is interrupted in its forward number ``at``, or just after it."""
    calls = [0]

    def stop(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == at + 1:
            raise KeyboardInterrupt

    layers = model.model.layers
    places = {
        "before attention": layers[0].self_attn.v_proj,
        "after attention": layers[0].self_attn.o_proj,
        "between layers": layers[0],
        "last attention": layers[1].self_attn.v_proj,
        "last layer": layers[1],
        "head": model.lm_head,
    }
    processors = [Stop(at)] if place == "tokens" else []
    hook = hooked(places[place], stop) if place in places else nullcontext()
    with hook, pytest.raises(KeyboardInterrupt):
        generate(model, ids, cache, logits_processor=processors)


PLACES = (
    "tokens", "before attention", "after attention", "between layers", "last attention",
    "last layer", "head",
)  # fmt: skip


@MOST_WAYS
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("at", [0, 4])
def test_a_cache_works_after_an_interruption(model, ids, how, place: str, at: int) -> None:
    want = fresh(model, ids, how)
    cache = cache_for(model, how)
    interrupted(model, ids, cache, place, at)
    after_reset(model, ids, cache, how)
    cache = cache_for(model, how)
    interrupted(model, ids, cache, place, at)
    if place in ("last layer", "head", "tokens"):  # the forward was over
        done = want[:, : ids.shape[1] + at + 1]
    else:
        done = want[:, : ids.shape[1] + at]
    # Without a reset: at once, or after one error that has taken the half forward back.
    new = want.shape[1] - done.shape[1]
    found = attempt(WHERE, generate, model, done, cache, new)
    if isinstance(found, Refused):
        assert isinstance(found.error, CacheStateError)
        assert "Run this one again" in found.text
        found = attempt(WHERE, generate, model, done, cache, new)
    assert torch.equal(found, want)


@pytest.mark.parametrize("at", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_a_compiled_model_works_after_an_interruption(ids, eager_inner, at: int) -> None:
    model = skv.compile(tiny("llama"), **HOW["grid"])
    want = generate(model, ids)
    with pytest.raises(KeyboardInterrupt):
        generate(model, ids, logits_processor=[Stop(at)])
    assert torch.equal(attempt(WHERE, generate, model, ids), want)


# ---------------------------------------------------------------- threads


def together(*work: Callable[[], Any]) -> list[Any]:
    """Do all of it at once, with threads that take turns as often as they can."""
    results: list[Any] = [None] * len(work)
    start = threading.Barrier(len(work))

    def do(n: int) -> None:
        start.wait()
        try:
            results[n] = attempt(WHERE, work[n])
        except BaseException as error:
            results[n] = error

    threads = [threading.Thread(target=do, args=(n,), daemon=True) for n in range(len(work))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "it hangs"
    finally:
        sys.setswitchinterval(interval)
    return results


@WAYS
def test_threads_with_a_cache_each_do_not_disturb_each_other(model, how: str) -> None:
    prompts = [padded_batch(1, width)[0] for width in (20, 33, 47)]
    want = [fresh(model, prompt, how) for prompt in prompts]

    def work(prompt: Tensor) -> Callable[[], Any]:
        return lambda: generate(model, prompt, cache_for(model, how))

    for found, expected in zip(together(*map(work, prompts)), want, strict=True):
        assert isinstance(found, Tensor), found
        assert torch.equal(found, expected)


@WAYS
def test_a_thread_is_refused_while_another_is_in_the_middle(model, ids, how: str) -> None:
    cache, twin = cache_for(model, how), cache_for(model, how)
    more = ids[:, :7]
    with torch.no_grad():
        for each in (cache, twin):
            model(ids, past_key_values=each)
        want = model(more, past_key_values=twin).logits
    inside, go_on = threading.Event(), threading.Event()
    me = threading.get_ident()

    def wait(*_: Any) -> None:
        if threading.get_ident() != me:
            inside.set()
            go_on.wait(30)

    @torch.no_grad()
    def forward() -> Tensor:
        return model(more, past_key_values=cache).logits

    found: list[Any] = []
    with hooked(model.model.layers[0], wait):
        other = threading.Thread(target=lambda: found.append(forward()), daemon=True)
        other.start()
        assert inside.wait(30)
        rows = torch.tensor([1, 0])
        for door in (forward, lambda: cache.crop(-3), lambda: cache.reorder_cache(rows)):
            refused = attempt(WHERE, door)
            assert isinstance(refused, Refused)
            assert isinstance(refused.error, CacheStateError)
            assert "another thread" in refused.text
        go_on.set()
        other.join(30)
    assert torch.equal(found[0], want)
    with torch.no_grad():  # and this thread may have it now
        assert torch.equal(forward(), model(more, past_key_values=twin).logits)


@WAYS
def test_threads_on_one_cache_end_and_leave_it_usable(model, ids, how: str) -> None:
    cache = cache_for(model, how)
    for found in together(*[lambda: generate(model, ids, cache)] * 2):
        assert isinstance(found, (Tensor, Refused)), found
    after_reset(model, ids, cache, how)


def test_threads_that_share_a_compiled_model_do_not_disturb_each_other(eager_inner) -> None:
    model = skv.compile(tiny("llama"), **HOW["grid"])
    prompts = [padded_batch(1, width)[0] for width in (20, 33, 47)]
    want = [generate(model, prompt) for prompt in prompts]

    def work(prompt: Tensor) -> Callable[[], Any]:
        return lambda: generate(model, prompt)

    for found, expected in zip(together(*map(work, prompts)), want, strict=True):
        assert isinstance(found, Tensor), found
        assert torch.equal(found, expected)
    kept = model._skv.cache
    assert torch.equal(generate(model, prompts[0]), want[0])
    assert model._skv.cache is kept


def test_a_thread_is_refused_while_another_is_in_a_compiled_step(eager_inner, ids) -> None:
    model = skv.compile(tiny("llama"), **HOW["grid"])
    cache = cache_for(model, "grid")
    compiled = model._skv.compiled(torch.device("cpu"))
    inside, go_on = threading.Event(), threading.Event()

    def slow(*args: Any, **kwargs: Any) -> Any:
        inside.set()
        go_on.wait(30)
        return compiled(*args, **kwargs)

    @torch.no_grad()
    def forward(tokens: Tensor) -> Tensor:
        return model(tokens, past_key_values=cache).logits

    forward(ids)
    model._skv._compiled = slow
    found: list[Any] = []
    other = threading.Thread(target=lambda: found.append(forward(ids[:, :1])), daemon=True)
    other.start()
    assert inside.wait(30)
    refused = attempt(WHERE, forward, ids[:, :1])
    go_on.set()
    other.join(60)
    assert isinstance(refused, Refused)
    assert "another thread" in refused.text
    assert isinstance(found[0], Tensor)
    assert cache.get_seq_length() == ids.shape[1] + 1
    forward(ids[:, :1])  # and this thread may have it now


# ---------------------------------------------------------------- copies


@WAYS
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_goes_on_where_the_original_was(model, ids, how: str, way: str) -> None:
    want = fresh(model, ids, how)
    cache = cache_for(model, how)
    part = generate(model, ids, cache, 5)
    if way == "deepcopy":
        other = attempt(WHERE, copy.deepcopy, cache)
    else:
        other = pickle.loads(attempt(WHERE, pickle.dumps, cache))
    cache.reset()  # what becomes of one is nothing to the other
    generate(model, ids.flip(-1), cache)
    assert torch.equal(attempt(WHERE, generate, model, part, other, NEW - 5), want)
    after_reset(model, ids, cache, how)


def test_a_cache_of_a_compiled_model_can_be_pickled(ids) -> None:
    model = skv.compile(tiny("llama"), **HOW["grid"])
    cache = cache_for(model, "grid")
    with torch.no_grad():
        model(ids, past_key_values=cache)
        other = pickle.loads(attempt(WHERE, pickle.dumps, cache))
        more = ids[:, :4]
        want = model(more, past_key_values=cache).logits
        assert torch.equal(model(more, past_key_values=other).logits, want)
