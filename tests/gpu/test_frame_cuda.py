"""The frame codec on a CUDA device: calibration, compiled decoding, and CUDA graphs in use."""

from __future__ import annotations

import torch
from torch._dynamo.utils import counters

import skv_compile as skv
from skv_compile.cache.state import LayerState
from skv_compile.lowering import eigen

from .test_generate_cuda import llama, prompt, settings


def states(device: str) -> LayerState:
    torch.manual_seed(3)
    config = skv.Config(bits=2.2, retention="none")
    state = LayerState(config, 2, 2, 64, 2048, torch.float32, torch.device(device), group=2)
    k, v = torch.randn(2, 2, 2, 700, 64).to(device)
    q = torch.randn(2, 4, 700, 64).to(device)
    position = torch.arange(700, device=device)
    state.calibrate(q, k, v, None, position)
    state.retain(q, k, v, None, position, 64**-0.5)
    state.append(k, v, None, position)
    return state


def test_calibration_and_codes_agree_with_the_cpu():
    cpu, cuda = states("cpu"), states("cuda")
    assert torch.equal(cpu.tensors.meta, cuda.tensors.meta.cpu())
    for exact, here in zip(cpu.dense(), cuda.dense(), strict=True):
        error = (here.cpu() - exact).square().mean() / exact.square().mean()
        assert error < 0.02  # a few codes at the edge of a cell fall the other way


def test_eigenvectors_diagonalise_a_matrix():
    basis = torch.linalg.qr(torch.randn(16, 128, 128, device="cuda", dtype=torch.float64))[0]
    wanted = 10 ** (-6 * torch.linspace(0, 1, 128, device="cuda", dtype=torch.float64))
    x = (basis * wanted) @ basis.mT
    values, vectors = eigen.eigh(x.float())
    vectors = vectors.double()
    rest = vectors.mT @ x @ vectors - torch.diag_embed(values.double())
    assert rest.norm() < 1e-2 * x.norm()
    eye = torch.eye(128, device="cuda", dtype=torch.float64)
    assert (vectors.mT @ vectors - eye).abs().max() < 1e-4


def test_generate_decodes_through_cuda_graphs_without_a_skip():
    torch._dynamo.reset()
    counters.clear()
    model = llama(torch.bfloat16)
    skv.compile(model, bits=2.2, retention="none")
    model.generate(**prompt(1, 700), **settings(64))
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_decoding_equals_eager_decoding_on_the_same_codes():
    torch._dynamo.reset()
    model = llama()
    text = prompt(2, 700)
    eager = skv.SphericalCache(model.config, 1024, bits=2.2, retention="none")
    want = model.generate(
        **text,
        **settings(80),
        past_key_values=eager,
        disable_compile=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    skv.compile(model, bits=2.2, retention="none")
    got = model.generate(**text, **settings(80), return_dict_in_generate=True, output_logits=True)
    first = (got.sequences != want.sequences).any(0).nonzero()
    steps = (int(first[0]) - 700 if len(first) else 80) or 1
    for a, b in zip(got.logits[:steps], want.logits[:steps], strict=True):
        assert (a - b).abs().max() < 1e-3
    assert steps > 40


def test_a_compiled_prefill_calibrates_under_reduce_overhead():
    torch._dynamo.reset()
    model = llama()
    ids = prompt(1, 600)["input_ids"]
    caches = [skv.SphericalCache(model.config, 1024, bits=2.2, retention="none") for _ in range(2)]
    with torch.no_grad():
        want = model(ids, past_key_values=caches[0]).logits
        caches[1].early_initialization(1, 2, 64, torch.float32, torch.device("cuda"))
        compiled = torch.compile(model, backend="skv", mode="reduce-overhead", fullgraph=True)
        got = compiled(ids, past_key_values=caches[1]).logits.clone()
        assert (got - want).abs().max() < 1e-3
        for _ in range(3):
            token = ids[:, :1]
            want = model(token, past_key_values=caches[0]).logits
            got = compiled(token, past_key_values=caches[1]).logits.clone()
            assert (got - want).abs().max() < 0.05
    for eager, compiled_state in zip(caches[0].states, caches[1].states, strict=True):
        error = (eager.dense()[0] - compiled_state.dense()[0]).square().mean()
        assert error < 0.02 * eager.dense()[0].square().mean()
