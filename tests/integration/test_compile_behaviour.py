"""How many graphs, what is in them, and who else may take part."""

from __future__ import annotations

import pytest
import torch
from support import (
    NATIVE,
    SMALL,
    PlainModel,
    attention_inputs,
    cached_attention,
    greedy,
    layer_state,
    max_error,
    padded_batch,
    same_state,
    tiny,
)
from torch._dynamo.utils import ReinplaceCounters, counters
from torch._inductor.utils import run_and_get_code
from transformers import StaticCache

import skv_compile as skv
from skv_compile.backend import SkvBackend
from skv_compile.cache import phantom

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


# ---------------------------------------------------------------- how many graphs


def test_decoding_is_one_graph_for_200_steps_and_a_second_cache() -> None:
    model = tiny("llama")
    ids, mask = padded_batch(3)
    step = decode_step(model)
    want = greedy(model, cache_for(model, 256), ids, mask, 200)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = greedy(step, cache_for(model, 256), ids, mask, 200, prefill=model)
        assert torch.equal(got[0], want[0])
        assert graphs() == 1
        greedy(step, cache_for(model, 256), ids, mask, 5, prefill=model)
    assert graphs() == 1
    assert not counters["graph_break"]


@pytest.mark.slow
def test_sliding_layers_cost_no_more_graphs_than_in_a_dense_static_cache() -> None:
    """The sliding layers of transformers keep a Python number that Dynamo learns to generalise."""
    model = tiny("gemma3")
    ids, mask = padded_batch(3)

    def count(step, make) -> int:
        before = graphs()
        for _ in range(2):
            cache = make()
            greedy(step, cache, ids, mask, 60, prefill=model)
        return graphs() - before

    dense = count(
        torch.compile(model, backend="eager", fullgraph=True),
        lambda: StaticCache(config=model.config, max_cache_len=128),
    )
    torch._dynamo.reset()
    assert count(decode_step(model), lambda: cache_for(model)) <= dense


@pytest.mark.slow
def test_another_length_or_codec_is_another_graph_and_right() -> None:
    model = tiny("llama")
    ids, mask = padded_batch(3)
    step = decode_step(model)
    want = greedy(model, cache_for(model), ids, mask, NEW)
    for n, (length, settings) in enumerate(
        [
            (128, {}),
            (160, {}),
            (128, {"codec": "grid"}),
            (128, {"codec": "grid", "bits": 3.0}),
            (128, {"codec": "grid", "recent": 20}),
            # Of budgets, pages are the same and their number is not.
            (2048, {"codec": "grid", "retention": "rdr", "page_tokens": 8, "bits": 1.5}),
            (2048, {"codec": "grid", "retention": "rdr", "page_tokens": 8, "bits": 4.0}),
        ],
        start=1,
    ):
        eager = greedy(model, cache_for(model, length, **settings), ids, mask, NEW)
        got = greedy(
            step,
            cache_for(model, length, **settings),
            ids,
            mask,
            NEW,
            prefill=model,
            forced=eager[0],
        )
        assert max_error(got[1], eager[1]) < NATIVE
        if "codec" not in settings:
            assert torch.equal(got[0], want[0])
        assert graphs() == n
    # Back to the first: its graph is still there.
    greedy(step, cache_for(model), ids, mask, 4, prefill=model)
    assert graphs() == 7


def test_generate_after_skv_compile_makes_one_graph_for_all_calls(eager_inner: None) -> None:
    model = skv.compile(tiny("llama"), codec="identity", **SMALL)
    for width, new in ((40, 30), (25, 60), (40, 30)):
        ids, mask = padded_batch(2, width)
        model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
    assert graphs() == 1


def test_a_plain_module_decodes_in_one_graph() -> None:
    model = PlainModel()
    step = torch.compile(model, backend="skv", options={**EAGER, **SMALL}, fullgraph=True)
    with torch.no_grad():
        step(torch.zeros(1, 10, dtype=torch.int64), torch.arange(10))
        first = graphs()
        for t in range(10, 60):
            step(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([t]))
    # The first step after the buffers became phantoms may see another input, later ones not.
    assert graphs() <= first + 2


def test_a_graph_never_runs_on_a_cache_it_was_not_compiled_for() -> None:
    """Guards prevent it; where they do not, the wrapper does."""
    calls = []

    def spy(gm, inputs):
        compiled = SkvBackend(options=EAGER)(gm, inputs)

        def run(*args):
            calls.append((compiled, args))
            return compiled(*args)

        return run

    states = [layer_state(codec, batch=1, tokens=512) for codec in ("identity", "grid")]
    phantoms = [[phantom.make(state) for _ in range(2)] for state in states]
    arguments = list(attention_inputs())
    arguments[3:5] = phantoms[0]
    torch.compile(cached_attention, backend=spy)(*arguments)
    compiled, args = calls[0]
    other = iter(phantoms[1])
    swapped = [x if phantom.state_of(x) is None else next(other) for x in args]
    unchanged = same_state(states[1])
    with pytest.raises(skv.CacheStateError, match="compiled for a cache of exact"):
        compiled(*swapped)
    assert unchanged()


# ---------------------------------------------------------------- what is in a graph


def large(state) -> list[torch.Tensor]:
    return [state.tensors.exact_keys, state.tensors.exact_values, state.tensors.pool]


def copies(code: str, state) -> list[str]:
    """Allocations in generated code that have the size of a pool or of an exact region."""
    shapes = [tuple(x.shape) for x in large(state)]
    flat = [x.numel() for x in large(state)]
    wanted = [f"(({', '.join(map(str, s))})" for s in shapes] + [f"(({n}, )" for n in flat]
    return [
        line.strip()
        for line in code.splitlines()
        if "empty_strided" in line and any(w in line for w in wanted)
    ]


@pytest.mark.parametrize("codec", ["grid"])
def test_generated_code_copies_no_pool_and_no_exact_region(codec: str) -> None:
    settings = {"codec": codec, **SMALL, "sinks": 5, "recent": 11}
    step = torch.compile(cached_attention, backend="skv", options=settings, fullgraph=True)
    _, code = run_and_get_code(step, *attention_inputs())
    code = "\n".join(code)
    assert "skv.append" in code
    assert "skv.attend" in code
    state = layer_state(batch=1, tokens=512, **{**settings, "bits": 4.125})
    assert copies(code, state) == []
    assert ".clone(" not in code
    assert "copy_(" not in code


@pytest.mark.slow
def test_a_models_step_writes_its_caches_in_place() -> None:
    """Where Inductor reads a cache after it wrote it, it has to copy it first."""
    model = tiny("llama")
    cache = cache_for(model, codec="frame", retention="rdr", bits=4.5)
    cache.early_initialization(1, 2, 16, torch.float32, torch.device("cpu"))
    step = torch.compile(model.forward, backend="skv", fullgraph=True)
    ids, position = torch.ones(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long)
    ReinplaceCounters.clear()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        _, code = run_and_get_code(step, ids, position_ids=position, past_key_values=cache)
    assert ReinplaceCounters.get_total_missed() == 0
    assert copies("\n".join(code), cache.states[0]) == []


def test_the_search_for_copies_would_find_one() -> None:
    state = layer_state("grid", batch=1, tokens=512, sinks=5, recent=11)
    for x in large(state):
        _, code = run_and_get_code(torch.compile(lambda x: (x + 1).sin().cos()), x)
        assert copies("\n".join(code), state)


def test_inductor_and_the_eager_reference_store_the_same_bytes() -> None:
    states = []
    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        options = {"inner": inner, **SMALL}
        step = torch.compile(cached_attention, backend="skv", options=options)
        first = attention_inputs(60)
        keys, values = first[3:5]
        step(*first)
        for t in range(60, 80):
            q, k, v, _, _, position, mask = attention_inputs(1, t)
            out = step(q, k, v, keys, values, position, mask)
        states.append((out, keys._skv_state))
    assert max_error(states[0][0], states[1][0]) < 1e-5
    for _, state in states:
        state.keeper.maintain()
    one, other = (s.tensors for _, s in states)
    assert one.meta[0].tolist() == [0, 80, 64, 0]
    assert torch.equal(one.meta, other.meta)
    pools = [t.pool[t.table[0, :, :8].long()] for t in (one, other)]
    assert torch.equal(*pools)


def test_dynamos_own_graph_is_left_as_it_was() -> None:
    seen = []

    def spy(gm, inputs):
        before = str(gm.graph)
        compiled = SkvBackend(options={**EAGER, **SMALL})(gm, inputs)
        seen.append((before, str(gm.graph)))
        return compiled

    torch.compile(cached_attention, backend=spy)(*attention_inputs())
    assert len(seen) == 1
    assert "scaled_dot_product_attention" in seen[0][0]
    assert seen[0][0] == seen[0][1]
