"""What ``skv bench`` measures, with and without packages of others; nothing is timed."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import tiny

from skv_compile import cli
from skv_compile.bench import attend, extras, paged, prefill, quantized, step, timing

HF = "HF QuantizedCache 4 bits"
FLASHINFER = ["flashinfer bf16", "flashinfer fp8"]
DENSE = ["sdpa enable_gqa", "sdpa of repeated keys"]


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The modules that are found, apart from what is really there."""
    there: set[str] = set()

    def find(module: str) -> Any:
        parent = module.rpartition(".")[0]
        if parent and parent not in there:
            raise ModuleNotFoundError(f"No module named {parent!r}")
        return SimpleNamespace() if module in there else None

    monkeypatch.setattr(extras, "find_spec", find)
    return there


def test_without_packages_their_lines_are_left_out_and_named(packages: set[str]) -> None:
    assert attend.names(2048, 1) == [*DENSE, *attend.OURS]
    assert step.names(8192, 1) == prefill.names(8192, 1) == ["HF static", *step.OURS]
    assert attend.missing() == ["flashinfer is not installed"]
    assert step.missing() == [f"{HF}: neither optimum-quanto nor hqq is installed"]
    assert prefill.missing() == []


def test_a_namespace_without_the_package_does_not_count(packages: set[str]) -> None:
    packages.add("optimum")
    assert HF not in step.names(8192, 1)


@pytest.mark.parametrize("module", ["optimum.quanto", "hqq"])
def test_with_packages_their_lines_are_measured(packages: set[str], module: str) -> None:
    packages |= {"flashinfer", "optimum", module}
    assert attend.names(2048, 1) == [*DENSE, *FLASHINFER, *attend.OURS]
    assert attend.names(32768, 1) == [*DENSE, "flex_attention", *FLASHINFER, *attend.OURS]
    measured = [shape for shape in step.SHAPES if HF in step.names(*shape)]
    assert measured == [(8192, 1), (32768, 1)]
    assert prefill.names(8192, 1) == ["HF static", *step.OURS]
    assert attend.missing() == step.missing() == []


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a stand-in for FlashInfer is asked for; its attention returns its arguments."""
    calls: list[Any] = []

    class Wrapper:
        def __init__(self, workspace: Any, layout: str, **kw: Any) -> None:
            calls.append((layout, kw))

        def plan(self, *given: Any, **kw: Any) -> None:
            calls.append((given, kw))

        def run(self, q: Any, pool: Any) -> Any:
            return q, pool

    stand_in = SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Wrapper)
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    return calls


@pytest.mark.parametrize("name", FLASHINFER)
def test_pages_of_flashinfer_are_each_of_one_row(planned: list[Any], name: str) -> None:
    q = torch.randn(3, 8, 1, 32, dtype=torch.bfloat16)
    dtype = paged.PAGED[name]
    launches = paged.launches(dtype, q, heads=2, tokens=64, sets=2)
    assert planned[0] == ("HND", {"use_tensor_cores": True})
    (first, pages, last, *sizes), types = planned[1]
    assert first.tolist() == [0, 4, 8, 12]
    assert sorted(pages.tolist()) == list(range(12))
    assert last.tolist() == [16] * 3
    assert {x.dtype for x in (first, pages, last)} == {torch.int32}
    assert sizes == [8, 2, 32, 16]
    assert types == {"q_data_type": torch.bfloat16, "kv_data_type": dtype}
    (queries, one), (_, other) = (launch() for launch in launches)
    assert queries.shape == (3, 8, 32)
    assert one.shape == other.shape == (12, 2, 2, 16, 32)
    assert one.dtype == other.dtype == dtype
    assert one.data_ptr() != other.data_ptr()
    assert len(planned) == 2  # one wrapper, planned once


def test_a_page_of_flashinfer_is_full(planned: list[Any]) -> None:
    with pytest.raises(ValueError, match="65 tokens do not fill pages of 16"):
        paged.launches(torch.bfloat16, torch.randn(1, 8, 1, 32), heads=2, tokens=65, sets=1)


def test_flashinfer_takes_what_it_is_asked_for() -> None:
    flashinfer = pytest.importorskip("flashinfer", reason="flashinfer is not installed")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper
    inspect.signature(wrapper).bind(None, "HND", use_tensor_cores=True)
    given = inspect.signature(wrapper.plan).bind(*range(8), q_data_type=0, kv_data_type=0)
    wanted = ["self", "indptr", "indices", "last_page_len", "num_qo_heads", "num_kv_heads"]
    assert list(given.arguments)[:8] == [*wanted, "head_dim", "page_size"]
    assert list(inspect.signature(wrapper.run).parameters)[:3] == ["self", "q", "paged_kv_cache"]


@pytest.mark.parametrize("module", quantized.BACKENDS)
def test_a_quantized_cache_is_full_and_can_be_decoded_with(
    monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    if not extras.installed(module):
        pytest.skip(f"{module} is not installed")
    monkeypatch.setattr(quantized, "BACKENDS", {module: quantized.BACKENDS[module]})
    llama = tiny("llama", hidden_size=256).bfloat16()
    cache = quantized.quantized(llama, 2, 64, 256, 1)
    assert cache.get_seq_length() == 256
    assert all(layer.keys.numel() == 0 for layer in cache.layers)
    position = torch.full((1, 1), 256)
    with torch.no_grad():
        for _ in range(3):
            out = llama(torch.ones(1, 1).long(), position_ids=position, past_key_values=cache)
            position.add_(1)
    assert out.logits.isfinite().all()
    assert cache.get_seq_length() == 259


def test_the_command_says_what_it_cannot_measure(
    monkeypatch: pytest.MonkeyPatch,
    packages: set[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def line(name: str, *given: Any) -> dict[str, Any]:
        return {"name": name, "ms": 2.0 if "static" in name else 1.0}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(torch.cuda, "empty_cache", list)
    monkeypatch.setattr(timing, "bandwidth", lambda: 1e12)
    monkeypatch.setattr(step, "model", lambda: None)
    for part in (attend, step, prefill):
        monkeypatch.setattr(part, "line", line)
    packages |= {"flashinfer"}
    file = tmp_path / "bench.json"
    assert cli.main(["bench", "--most", "8192", "--json", str(file)]) == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    note = f"{HF}: neither optimum-quanto nor hqq is installed"
    assert result["not_measured"] == [note]
    assert capsys.readouterr().err.count(f"not measured: {note}\n") == 1
    assert {x["name"] for x in result["attend"]} == {*DENSE, *FLASHINFER, *attend.OURS}
    assert [x["faster"] for x in result["step"]] == [1.0, *[2.0] * len(step.OURS)]
    assert result["bytes_per_second"] == 1e12
