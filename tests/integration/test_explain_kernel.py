"""The kernel that a report names is the one that runs."""

from __future__ import annotations

import pytest
import torch
from support import SMALL, attention_inputs, cached_attention, prompt, symbolic, tiny

import skv_compile as skv
from skv_compile.lowering import choice, kernels, ops
from skv_compile.lowering.cpu import library
from skv_compile.report import SiteReport, listening

needs_library = pytest.mark.skipif(library.load() is None, reason="no native kernels here")
HEADS = 2


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens every forward had that ran natively."""
    calls: list[int] = []
    real = ops.cpu.attend

    def attend(q, *rest):
        calls.append(q.shape[2])
        return real(q, *rest)

    monkeypatch.setattr(ops.cpu, "attend", attend)
    return calls


def run(*forwards, **settings) -> list[SiteReport]:
    """Forwards on one dense cache, compiled; the report of each graph's only site."""
    step = torch.compile(
        cached_attention,
        backend="skv",
        options={"inner": "eager", "codec": "grid", **SMALL, **settings},
    )
    keys, values = forwards[0][3:5]
    with listening() as graphs, torch.no_grad():
        for q, k, v, _, _, position, mask in forwards:
            step(q, k, v, keys, values, position, mask)
    return [graph.sites[0] for graph in graphs]


@needs_library
def test_one_token_runs_on_the_native_variant_that_is_named(native: list[int]) -> None:
    (site,) = run(attention_inputs())
    assert native == [1]
    assert site.kernel == f"native {library.variant()}"
    assert site.kernel_reason == library.why()


@needs_library
def test_several_tokens_say_that_a_prompt_runs_on_the_reference(native: list[int]) -> None:
    sites = run(attention_inputs(5), attention_inputs(5, 5))
    assert native == [5]  # of the second forward
    for site in sites:
        assert site.kernel == f"native {library.variant()}"
        assert site.kernel_reason.endswith(f"on the PyTorch reference: {kernels.FIRST}")


@pytest.mark.parametrize(
    ("words", "tokens", "settings"),
    [
        ("codes of kind 'rings' have no native kernel", 1, {"codec": "rings"}),
        ("codes of kind 'exact' have no native kernel", 1, {"codec": "identity"}),
        (kernels.LONG, kernels.MOST_TOKENS + 1, {}),
    ],
)
@needs_library
def test_what_runs_on_the_reference_says_why(
    words: str, tokens: int, settings: dict, native: list[int]
) -> None:
    sites = run(attention_inputs(tokens), attention_inputs(tokens, tokens), **settings)
    assert native == []
    assert {(site.kernel, site.kernel_reason) for site in sites} == {(choice.REFERENCE, words)}


@needs_library
def test_a_mask_of_its_own_for_every_head_is_named(native: list[int]) -> None:
    *rest, mask = attention_inputs()
    (site,) = run((*rest, mask.expand(1, HEADS, 1, -1).contiguous()))
    assert native == []
    assert site.kernel_reason == "a mask of its own for every head"


def test_the_switch_is_named(monkeypatch: pytest.MonkeyPatch, native: list[int]) -> None:
    monkeypatch.setenv(library.SWITCH, "reference")
    (site,) = run(attention_inputs())
    assert native == []
    assert (site.kernel, site.kernel_reason) == (choice.REFERENCE, "SKV_CPU=reference")


@needs_library
def test_a_variant_that_is_asked_for_is_named_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.SWITCH, "portable")
    (site,) = run(attention_inputs())
    assert (site.kernel, site.kernel_reason) == ("native portable", "SKV_CPU=portable")


def test_without_a_compiler_the_reason_is_what_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path, caplog
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setenv("SKV_CACHE_DIR", str(tmp_path))
    library._loaded.cache_clear()
    try:
        (site,) = run(attention_inputs())
    finally:
        library._loaded.cache_clear()
    assert site.kernel == choice.REFERENCE
    assert "could not be built: there is no C++ compiler" in site.kernel_reason


@needs_library
def test_a_symbolic_length_is_named_and_stays_symbolic() -> None:
    step = torch.compile(prompt, backend="skv", options={"inner": "eager", **SMALL})
    keys, values = attention_inputs()[3:5]
    with listening() as graphs, torch.no_grad():
        for tokens in (3, 9, 12):
            step(symbolic(tokens), keys, values)
    kernels_named = [graph.sites[0].kernel_reason for graph in graphs]
    assert "(of 3 tokens; chosen anew for every length)" in kernels_named[0]
    # Asking added no guard: the graph serves all lengths. Another one knows that the buffers have
    # become phantoms.
    assert len(graphs) == 2


def test_on_a_gpu_the_words_are_those_of_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda, dtype, device = True, torch.float32, torch.device("cuda", 0)

        def __init__(self, *shape: int) -> None:
            self.shape = shape

    layout = skv.SphericalCache(tiny("llama").config, 64, codec="grid", **SMALL)
    model = tiny("llama")
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long), past_key_values=layout)
    form = layout.states[0].layout
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(kernels, "triton_found", lambda: True)
    monkeypatch.delenv(kernels.SWITCH, raising=False)
    q, k = OnGpu(1, 4, 1, 16), OnGpu(1, 2, 1, 16)
    found = choice.choose(form, q, k, None, 4, False)
    assert found == (choice.REFERENCE, "the GPU is older than compute capability 8.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    found = choice.choose(form, q, k, None, 4, False)
    assert found == ("Triton", "query rows of a kv head: 2 of at most 64")
    assert (
        choice.refusal(form, OnGpu(1, 4, 2, 16), k, None, 4, False, lambda: True) is kernels.FIRST
    )


def test_explain_counts_the_bytes_of_the_length_that_is_asked_for() -> None:
    token = torch.zeros(1, 1, dtype=torch.long)
    report = skv.explain(tiny("llama"), token, max_cache_len=2048)
    assert {site.max_tokens for site in report.sites} == {2048}
    assert report.dense_bytes == 2 * 2 * 2 * 2048 * 16 * 4  # layers, sides, heads, tokens, dim
    assert report.resident_bytes < report.dense_bytes / 3
    with pytest.raises(skv.ConfigError, match="has a length already"):
        skv.explain(cached_attention, *attention_inputs(), max_cache_len=2048)


def test_explain_names_the_kernel_of_every_layer_of_a_model() -> None:
    report = skv.explain(tiny("llama"), torch.zeros(1, 1, dtype=torch.long))
    assert len(report.rewritten) == 2
    for site in report.sites:
        assert site.kernel
        assert site.kernel_reason
    assert report.settings["retention"] == "rdr"
    assert list(report.sites[0].tiers) == sorted(report.sites[0].tiers)
