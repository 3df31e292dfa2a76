"""What is left behind of a graph: files, a script that runs the pass again, a trace."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import (
    SMALL,
    PlainModel,
    attention_inputs,
    cached_attention,
    padded_batch,
    plain_greedy,
    prompt,
    symbolic,
    tiny,
)
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention
from transformers import DynamicCache

import skv_compile as skv
from skv_compile.backend import SkvBackend
from skv_compile.cache import phantom
from skv_compile.dump import Trail
from skv_compile.report import Report, listening

EAGER = {"inner": "eager"}
ROOT = Path(__file__).resolve().parents[2]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def again(script: Path) -> str:
    """What a repro prints, run in this process."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as done:
        runpy.run_path(str(script))
    assert done.value.code == 0
    return said.getvalue().rstrip("\n")


def compiled(model, folder: Path):
    return torch.compile(model, backend="skv", options={**EAGER, **SMALL, "dump": str(folder)})


# ---------------------------------------------------------------- files


def test_every_graph_leaves_four_files_and_numbers_continue(tmp_path: Path) -> None:
    step = compiled(PlainModel(), tmp_path)
    with torch.no_grad():
        step(torch.zeros(1, 10, dtype=torch.int64), torch.arange(10))
    kinds = ("after.py", "before.py", "report.json", "repro.py")
    assert files(tmp_path) == [f"000_{kind}" for kind in kinds]
    before, after = ((tmp_path / f"000_{x}.py").read_text() for x in ("before", "after"))
    assert before.startswith("# Graph 000 as Dynamo gave it")
    assert before.count("_nn.scaled_dot_product_attention(") == 2
    assert "skv.attend" not in before
    assert "support.py" in before  # source lines
    assert after.count("torch.ops.skv.attend.default(") == 2
    assert "_nn.scaled_dot_product_attention(" not in after
    for text in (before, after):
        compile(text, "graph", "exec")
    found = json.loads((tmp_path / "000_report.json").read_text())
    assert found["rewritten"] == 2
    assert found["settings"]["recent"] == SMALL["recent"]
    (tmp_path / "041_notes.txt").touch()
    skv.explain(PlainModel(), torch.zeros(1, 4, dtype=torch.int64), torch.arange(4), dump=tmp_path)
    assert [name for name in files(tmp_path) if name > "041_z"] == [f"042_{x}" for x in kinds]


def test_a_graph_without_attention_is_dumped_too(tmp_path: Path) -> None:
    step = torch.compile(
        lambda x: x.sin() + 1, backend="skv", options={**EAGER, "dump": str(tmp_path)}
    )
    step(torch.ones(3))
    assert len(files(tmp_path)) == 4
    assert "sin()" in (tmp_path / "000_after.py").read_text()
    assert again(tmp_path / "000_repro.py").startswith("0 of 0 attentions")


def test_skv_compile_dumps_what_generate_compiles(tmp_path: Path, eager_inner: None) -> None:
    model = skv.compile(tiny("llama"), codec="identity", dump=tmp_path, **SMALL)
    ids, mask = padded_batch(2)
    model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert json.loads((tmp_path / "000_report.json").read_text())["rewritten"] == 2


def test_a_folder_of_the_time_of_the_call_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eager_inner: None
) -> None:
    monkeypatch.chdir(tmp_path)
    model = skv.compile(tiny("llama"), codec="identity", dump="look", **SMALL)
    monkeypatch.chdir("/")
    model.generate(torch.ones(1, 8, dtype=torch.long), max_new_tokens=3, do_sample=False)
    assert len(files(tmp_path / "look")) >= 4


def test_what_was_compiled_before_is_dumped_when_that_is_asked_for(tmp_path: Path) -> None:
    for dump in (None, tmp_path):  # the same function, and buffers that are dense
        backend = SkvBackend(options={**EAGER, **SMALL, "dump": dump})
        with torch.no_grad():
            torch.compile(cached_attention, backend=backend)(*attention_inputs())
    assert files(tmp_path)


# ---------------------------------------------------------------- it changes nothing


def test_results_are_the_same_with_and_without(tmp_path: Path) -> None:
    ids = torch.randint(0, 64, (1, 40))
    got = []
    for more in ({}, {"dump": str(tmp_path)}):
        torch._dynamo.reset()
        options = {**EAGER, **SMALL, "codec": "grid", **more}
        got.append(
            plain_greedy(torch.compile(PlainModel(), backend="skv", options=options), ids, 20)
        )
    assert torch.equal(got[0][0], got[1][0])
    assert torch.equal(got[0][1], got[1][1])
    assert files(tmp_path)


def test_no_key_of_a_cache_knows_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither Inductor's on disk, which the second compile finds, nor what graphs know of a
    state."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    texts = []
    for more in ({}, {"dump": str(tmp_path / "dump")}):
        torch._dynamo.reset()
        counters.clear()
        step = torch.compile(cached_attention, backend="skv", options={**SMALL, **more})
        arguments = attention_inputs()
        with torch.no_grad():
            step(*arguments)
        state = phantom.state_of(arguments[3])
        texts.append((state.signature, state.layout.key, state.config))
        hits = counters["inductor"]["fxgraph_cache_hit"]
        assert hits == (1 if more else 0)
    assert texts[0] == texts[1]
    assert files(tmp_path / "dump")


# ---------------------------------------------------------------- folders that cannot be written


@pytest.mark.parametrize("name", ["file", "file/inside", "", 3])
def test_a_folder_that_cannot_be_written_is_refused_first(name, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = str(tmp_path / name) if name and isinstance(name, str) else name
    model = tiny("llama")
    with pytest.raises(skv.ConfigError, match="dump="):
        skv.compile(model, dump=folder)
    assert "forward" not in model.__dict__
    calls = []
    with pytest.raises(skv.ConfigError, match="dump="):
        skv.explain(lambda x: calls.append(x), torch.zeros(1), dump=folder)
    assert calls == []
    step = torch.compile(cached_attention, backend="skv", options={**EAGER, "dump": folder})
    with pytest.raises(Exception, match="dump=") as error, torch.no_grad():
        step(*attention_inputs())
    assert isinstance(error.value.inner_exception, skv.ConfigError)


def test_a_folder_that_is_gone_is_an_error_that_says_so(tmp_path: Path) -> None:
    backend = SkvBackend(options={**EAGER, "dump": tmp_path / "gone"})
    (tmp_path / "gone").rmdir()
    with pytest.raises(Exception, match="a file could not be written there"), torch.no_grad():
        torch.compile(cached_attention, backend=backend)(*attention_inputs())


# ---------------------------------------------------------------- the repro


@pytest.mark.parametrize("kind", ["transformers", "plain"])
def test_a_repro_finds_the_same_sites_in_a_process_of_its_own(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "dump"
    if kind == "plain":
        inputs = torch.zeros(1, 6, dtype=torch.int64), torch.arange(6)
        report = skv.explain(PlainModel(), *inputs, dump=folder)
    else:
        report = skv.explain(tiny("llama"), padded_batch(1)[0][:, :1], dump=folder)
    assert len(report.rewritten) == 2
    done = subprocess.run(
        [sys.executable, str(folder / "000_repro.py")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.rstrip("\n") == str(report)


def rdr(model, folder):
    """A policy with a budget, on a cache that is given."""
    config = skv.Config(bits=2.5, budget="150KB", recent=20)
    cache = skv.SphericalCache(model.config, 512, config)
    ids, _ = padded_batch(2)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return skv.explain(model, ids[:, :1], past_key_values=cache, dump=folder)


def dynamic(model, folder):
    """Foreign caches, whose length grows."""
    cache, ids = DynamicCache(config=model.config), padded_batch(1)[0]
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return skv.explain(model, ids[:, :1], past_key_values=cache, dump=folder)


def own(model, folder):
    return skv.explain(model, padded_batch(1)[0][:, :1], dump=folder)


@pytest.mark.parametrize(
    ("name", "look"),
    [
        ("llama", rdr),
        ("llama", dynamic),
        ("gemma3", own),  # a sliding layer
        pytest.param("gpt2", own, marks=pytest.mark.slow),
        pytest.param("neox", own, marks=pytest.mark.slow),
    ],
)
def test_the_repro_of_a_model_prints_the_same_report(name: str, look, tmp_path: Path) -> None:
    report = look(tiny(name), tmp_path)
    assert again(tmp_path / "000_repro.py") == str(report)


def seen(folder: Path, model, *inputs) -> str:
    """The report of one forward, as the backend gave it."""
    step = compiled(model, folder)
    with listening() as graphs, torch.no_grad():
        step(*inputs)
    return str(Report(tuple(graphs)))


def test_the_repro_keeps_symbolic_sizes(tmp_path: Path) -> None:
    want = seen(tmp_path, prompt, symbolic(5), *attention_inputs()[3:5])
    assert "(of 5 tokens" in want
    assert again(tmp_path / "000_repro.py") == want


def test_the_repro_keeps_what_shares_memory(tmp_path: Path) -> None:
    arguments = list(attention_inputs())
    both = torch.zeros(2, 1, 2, 512, 16)
    arguments[3:5] = both.unbind()
    want = seen(tmp_path, cached_attention, *arguments)
    assert "shares memory" in want
    assert again(tmp_path / "000_repro.py") == want


def test_the_repro_keeps_graphs_inside_of_graphs(tmp_path: Path) -> None:
    def step(q, k, v, keys, values, position, mask):
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)

        def score(score, b, h, i, j):
            return torch.where(j <= position[i], score, -torch.inf)

        return flex_attention(q, keys, values, score_mod=score)

    want = seen(tmp_path, step, *attention_inputs())
    assert "(flex)" in want
    assert again(tmp_path / "000_repro.py") == want


def test_a_repro_says_when_the_pass_refuses_the_graph(tmp_path: Path, capsys) -> None:
    model = tiny("llama")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(padded_batch(1)[0], past_key_values=cache)
        step = torch.compile(
            model, backend="skv", options={**EAGER, "strict": True, "dump": str(tmp_path)}
        )
        with pytest.raises(Exception, match="strict=True"):
            step(padded_batch(1)[0][:, :1], past_key_values=cache)
    assert "000_after.py" not in files(tmp_path)
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(tmp_path / "000_repro.py"))
    assert done.value.code == 2
    said = capsys.readouterr()
    assert "0 of 2 attentions" in said.out
    assert "strict=True" in said.err


def test_what_cannot_be_rebuilt_is_said(tmp_path: Path, caplog) -> None:
    class Odd(torch.Tensor):
        pass

    with caplog.at_level(logging.WARNING), torch.no_grad():
        gm = torch.fx.symbolic_trace(lambda x: x + 1)
        next(iter(gm.graph.nodes)).meta["example_value"] = torch.zeros(2)
        Trail(tmp_path).before(gm, [torch.zeros(2).as_subclass(Odd)], skv.Config())
    assert files(tmp_path) == ["000_before.py"]
    assert "graph 000" in caplog.text
    assert "input x is a Odd" in caplog.text


# ---------------------------------------------------------------- names, trace


def test_a_source_file_named_like_a_script_is_escaped_in_the_page(tmp_path: Path) -> None:
    source = tmp_path / "a<script>alert(1)<b>.py"
    source.write_text(
        "import torch.nn.functional as F\n"
        "def step(q, k, v, keys, values, position, mask):\n"
        "    keys[:, :, position] = k\n"
        "    values[:, :, position] = v\n"
        "    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)\n"
    )
    spec = importlib.util.spec_from_file_location("odd", source)
    odd = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(odd)
    report = skv.explain(odd.step, *attention_inputs(), dump=tmp_path / "dump")
    assert report.sites[0].where == f"{source.name}:5 in step"
    text = report.to_html()
    assert "<script>" not in text
    assert "a&lt;script&gt;alert(1)&lt;b&gt;.py:5 in step" in text
    assert again(tmp_path / "dump" / "000_repro.py") == str(report)


def test_the_structured_trace_has_the_graphs_and_the_report(tmp_path: Path) -> None:
    """In a process of its own: ``TORCH_TRACE`` is read when torch is imported."""
    code = (
        "import torch\n"
        "from support import attention_inputs, cached_attention\n"
        "step = torch.compile(cached_attention, backend='skv', options={'inner': 'eager'})\n"
        "with torch.no_grad(): step(*attention_inputs())\n"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"TORCH_TRACE": str(tmp_path / "trace"), "PYTHONPATH": paths},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (log,) = (tmp_path / "trace").iterdir()
    found: dict[str, str] = {}
    name, compile_id = "", None
    for line in log.read_text().splitlines():
        if line.startswith("\t"):
            found[name] = found.get(name, "") + line[1:] + "\n"
            continue
        entry = json.loads(line[line.index("{") :])
        name = entry.get("artifact", {}).get("name", "")
        if name.startswith("skv_"):
            compile_id = entry["frame_id"]  # tlparse shows it beside its frame
            assert entry["artifact"]["encoding"] == ("json" if name == "skv_report" else "string")
    assert compile_id == 0
    assert "scaled_dot_product_attention" in found["skv_graph_before"]
    assert "torch.ops.skv.attend.default" in found["skv_graph_after"]
    assert json.loads(found["skv_report"])["rewritten"] == 1
