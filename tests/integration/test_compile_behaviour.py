"""How many graphs, what is in them, and who else may take part."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
from support import (
    SMALL,
    PlainModel,
    greedy,
    layer_state,
    max_error,
    padded_batch,
    same_state,
    tiny,
)
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, StaticCache

import skv_compile as skv
from skv_compile import salt
from skv_compile.backend import SkvBackend
from skv_compile.cache import phantom
from skv_compile.config import Config

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
        assert max_error(got[1], eager[1]) < 1e-4
        if "codec" not in settings:
            assert torch.equal(got[0], want[0])
        assert graphs() == n
    # Back to the first: its graph is still there.
    greedy(step, cache_for(model), ids, mask, 4, prefill=model)
    assert graphs() == 5


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
    torch.compile(attention, backend=spy)(*arguments)
    compiled, args = calls[0]
    other = iter(phantoms[1])
    swapped = [x if phantom.state_of(x) is None else next(other) for x in args]
    unchanged = same_state(states[1])
    with pytest.raises(skv.CacheStateError, match="compiled for a cache of exact"):
        compiled(*swapped)
    assert unchanged()


# ---------------------------------------------------------------- what is in a graph


def attention(q, k, v, keys, values, input_pos, mask):
    keys[:, :, input_pos] = k
    values[:, :, input_pos] = v
    return scaled_dot_product_attention(q, keys, values, attn_mask=mask)


def attention_inputs(tokens: int = 1, start: int = 0):
    q, k, v = torch.randn(3, 1, 2, tokens, 16).unbind()
    keys, values = (torch.zeros(1, 2, 512, 16) for _ in range(2))
    position = torch.arange(start, start + tokens)
    mask = (torch.arange(512) <= position[:, None])[None, None]
    return q, k, v, keys, values, position, mask


def copies(code: str, state) -> list[str]:
    """Allocations in generated code that have the size of a pool or of an exact region."""
    shapes = [tuple(x.shape) for x in state.tensors[:3]]
    flat = [x.numel() for x in state.tensors[:3]]
    wanted = [f"(({', '.join(map(str, s))})" for s in shapes] + [f"(({n}, )" for n in flat]
    return [
        line.strip()
        for line in code.splitlines()
        if "empty_strided" in line and any(w in line for w in wanted)
    ]


@pytest.mark.parametrize("codec", ["grid"])
def test_generated_code_copies_no_pool_and_no_exact_region(codec: str) -> None:
    settings = {"codec": codec, **SMALL, "sinks": 5, "recent": 11}
    step = torch.compile(attention, backend="skv", options=settings, fullgraph=True)
    _, code = run_and_get_code(step, *attention_inputs())
    code = "\n".join(code)
    assert "skv.append" in code
    assert "skv.attend" in code
    state = layer_state(batch=1, tokens=512, **{**settings, "bits": 4.125})
    assert copies(code, state) == []
    assert ".clone(" not in code
    assert "copy_(" not in code


def test_the_search_for_copies_would_find_one() -> None:
    state = layer_state("grid", batch=1, tokens=512, sinks=5, recent=11)
    for x in state.tensors[:3]:
        _, code = run_and_get_code(torch.compile(lambda x: (x + 1).sin().cos()), x)
        assert copies("\n".join(code), state)


def test_inductor_and_the_eager_reference_store_the_same_bytes() -> None:
    states = []
    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        options = {"inner": inner, **SMALL}
        step = torch.compile(attention, backend="skv", options=options)
        first = attention_inputs(60)
        keys, values = first[3:5]
        step(*first)
        for t in range(60, 80):
            q, k, v, _, _, position, mask = attention_inputs(1, t)
            out = step(q, k, v, keys, values, position, mask)
        states.append((out, keys._skv_state))
    assert max_error(states[0][0], states[1][0]) < 1e-5
    one, other = (s.tensors for _, s in states)
    pages = int(one.meta[0, 2])
    assert pages == 8
    assert torch.equal(one.meta, other.meta)
    pools = [t.pool[:-1].view(2, -1, t.pool.shape[1])[:, :pages] for t in (one, other)]
    assert torch.equal(*pools)


def test_dynamos_own_graph_is_left_as_it_was() -> None:
    seen = []

    def spy(gm, inputs):
        before = str(gm.graph)
        compiled = SkvBackend(options={**EAGER, **SMALL})(gm, inputs)
        seen.append((before, str(gm.graph)))
        return compiled

    torch.compile(attention, backend=spy)(*attention_inputs())
    assert len(seen) == 1
    assert "scaled_dot_product_attention" in seen[0][0]
    assert seen[0][0] == seen[0][1]


# ---------------------------------------------------------------- others take part


class Counting(CustomGraphPass):
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph) -> None:
        self.calls += 1

    def uuid(self):
        return "counting"


def test_a_users_inductor_pass_runs_and_stays() -> None:
    user = Counting()
    settings = {"post_grad_custom_pre_pass": user, "force_disable_caches": True}
    with torch._inductor.config.patch(settings):
        torch.compile(attention, backend="skv", options=SMALL)(*attention_inputs())
        assert user.calls == 1
        assert torch._inductor.config.post_grad_custom_pre_pass is user


def test_a_salt_tells_configs_and_other_passes_apart() -> None:
    one, other = Config(), Config(bits=3.0)
    salted = salt.Salted
    assert salted(one).uuid() == salted(Config()).uuid()
    assert salted(one).uuid() != salted(other).uuid()
    assert salted(one, Counting()).uuid() not in (salted(one).uuid(), None)
    assert salted(one, Counting()).uuid() != salted(other, Counting()).uuid()
    # What cannot be named cannot be cached.
    assert salted(one, lambda graph: None).uuid() is None


def test_a_salt_changes_with_our_source(tmp_path, monkeypatch) -> None:
    for folder in ("lowering", "patterns", "codec"):
        (tmp_path / folder).mkdir()
    source = tmp_path / "lowering" / "ops.py"
    source.write_text("x = 1")
    monkeypatch.setattr(salt, "__file__", str(tmp_path / "salt.py"))
    salt.source_hash.cache_clear()
    try:
        before = salt.source_hash()
        source.write_text("x = 2")
        salt.source_hash.cache_clear()
        assert salt.source_hash() != before
    finally:
        salt.source_hash.cache_clear()


@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_a_spherical_cache_under_another_backend_is_right_or_says_why(backend: str) -> None:
    model = tiny("llama")
    ids, mask = padded_batch(2)
    want = greedy(model, cache_for(model), ids, mask, NEW)
    step = torch.compile(model, backend=backend)
    with contextlib.suppress(skv.SkvError):
        got = greedy(step, cache_for(model), ids, mask, NEW)
        assert torch.equal(got[0], want[0])
        assert max_error(got[1], want[1]) < 1e-4


@pytest.mark.parametrize("codec", ["identity", "grid"])
def test_a_cache_may_change_between_backends(codec: str) -> None:
    model = tiny("llama")
    ids, mask = padded_batch(2)
    want = greedy(model, cache_for(model, codec=codec), ids, mask, NEW)
    ours, other = decode_step(model), torch.compile(model, backend="eager")
    turns = iter(range(NEW))

    def step(*args, **kwargs):
        return (ours, other, model)[next(turns) % 3](*args, **kwargs)

    got = greedy(step, cache_for(model, codec=codec), ids, mask, NEW, prefill=model, forced=want[0])
    # Another backend reads decoded keys: sums in another order.
    assert max_error(got[1], want[1]) < 1e-4


# ---------------------------------------------------------------- options, warnings


def test_an_option_by_a_wrong_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(Exception, match=r"unknown option 'bit'.*Did you mean 'bits'\?"):
        torch.compile(attention, backend="skv", options={"bit": 2})(*attention_inputs())


def test_a_mode_by_a_wrong_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(skv.ConfigError, match=r"Did you mean 'reduce-overhead'\?"):
        SkvBackend(mode="reduce-overheads")


def test_inductor_settings_reach_inductor() -> None:
    seen = []
    options = {**SMALL, "inductor": {"post_grad_custom_post_pass": lambda graph: seen.append(graph)}}
    torch.compile(attention, backend="skv", options=options)(*attention_inputs())
    assert len(seen) == 1


def test_a_dynamic_cache_is_a_warning_that_names_what_to_pass(caplog) -> None:
    model = tiny("llama")
    ids, _ = padded_batch(1)
    step = torch.compile(model, backend="skv", options=EAGER)
    cache = DynamicCache(config=model.config)
    with caplog.at_level(logging.WARNING, "skv_compile"), torch.no_grad():
        model(ids, past_key_values=cache)
        step(ids[:, :1], past_key_values=cache)
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("skv_compile")]
    assert len(messages) == 1
    assert "SphericalCache" in messages[0]
    assert "2 attention(s)" in messages[0]


def test_strict_raises_where_an_attention_is_not_rewritten() -> None:
    model = tiny("llama")
    ids, _ = padded_batch(1)
    step = torch.compile(model, backend="skv", options={**EAGER, "strict": True})
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(Exception, match="strict=True") as error:
            step(ids[:, :1], past_key_values=cache)
    inner = getattr(error.value, "inner_exception", error.value)
    assert isinstance(inner, skv.UnsupportedError)


def test_explain_reports_what_the_backend_did_and_changes_nothing() -> None:
    model = tiny("llama")
    ids, _ = padded_batch(1)
    report = skv.explain(model, ids, config=skv.Config(**SMALL))
    assert [site.rewritten for site in report.sites] == [True, True]
    assert "llama" in report.sites[0].where
    assert "2 of 2" in str(report)
    refused = skv.explain(model, ids[:, :1], past_key_values=DynamicCache(config=model.config))
    assert not any(site.rewritten for site in refused.sites)
    assert all("SphericalCache" in site.reason for site in refused.sites)
    assert refused.to_dict()["refused"] == len(refused.sites)
