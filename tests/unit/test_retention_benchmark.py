"""The retention benchmark: its arithmetic, its parts, its verdict, and the script."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import VOCAB, tiny
from transformers import DynamicCache

import skv_compile as skv
from skv_compile import evaluate, metrics
from skv_compile.commands.common import UsageError
from skv_compile.commands.screen import Screen

FOLDER = str(Path(__file__).parents[2] / "benchmarks")
if FOLDER not in sys.path:
    sys.path.append(FOLDER)
long_generation, lines, verdict, retention = (
    importlib.import_module(name)
    for name in (
        "long_generation",
        "retention_lines",
        "retention_verdict",
        "retention",
    )
)
Setting = lines.Setting

TEXTS = {
    "one": "The quick brown fox jumps over the lazy dog. It does so again and again. " * 60,
    "two": "Alaska is large and cold. Its bears eat fish; its people, too. " * 60,
}


def encode(text: str) -> list[int]:
    return [ord(c) % VOCAB for c in text]


def arguments(**kw: Any) -> argparse.Namespace:
    given = {"codec": "frame", "sinks": 4, "recent": 64, "only": None, "bits": None}
    given |= {
        "prefix": 300,
        "retention_table": None,
        "timing": True,
        "long_tokens": 256,
        "step": 64,
    }
    return argparse.Namespace(**(given | kw))


def said(words: str) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


# ---------------------------------------------------------------- arithmetic


def test_quarters_are_means_of_consecutive_blocks() -> None:
    assert long_generation.quarters([1, 2, 3, 4, 5, 6, 7, 8]) == [1.5, 3.5, 5.5, 7.5]
    for values in ([1.0] * 6, []):
        with pytest.raises(ValueError, match="do not make 4 quarters"):
            long_generation.quarters(values)


@pytest.mark.parametrize(
    ("prompt", "wanted"), [(1024, 1028), (1028, 1028), (1029, 1092), (3, 132), (68, 132)]
)
def test_a_long_prompt_ends_with_a_stride(prompt: int, wanted: int) -> None:
    assert long_generation.aligned(prompt, 4, 64) == wanted


def test_lines_are_chosen_by_part_name_and_rate() -> None:
    notes: list[str] = []
    given = [Setting("rdr", 1.125), Setting("none", 1.125), Setting("rdr", 2.125)]

    def chosen(part: str = "long", **kw: Any) -> list[str]:
        return [x.name for x in lines.select(part, given, arguments(**kw), notes)]

    assert chosen() == ["rdr 1.125", "none 1.125", "rdr 2.125"]
    assert chosen(only=["long/rdr"]) == ["rdr 1.125", "rdr 2.125"]
    assert chosen(only=["passkey/rdr"]) == []
    assert chosen(only=["none", "rdr 2"]) == ["none 1.125", "rdr 2.125"]
    assert chosen(bits=[2.125]) == ["rdr 2.125"]
    assert not notes
    given += [Setting("nobody", 1.125), Setting("retrieval", 1.125)]
    assert "retrieval 1.125" not in chosen()
    assert notes == ["long/nobody 1.125 left out: there is no such policy"]
    assert "retrieval 1.125" in chosen(retention_table="file")


def test_every_policy_is_measured_at_every_rate() -> None:
    from skv_compile.retention.policies import POLICIES

    found = {(x.retention, x.bits) for x in lines.policy_settings()}
    wanted = {(name, bits) for name in POLICIES for bits in (1.125, 1.625, 2.125, 3.125)}
    assert found == wanted | {("rdr", 0.75), ("none", 4.125)}


# ---------------------------------------------------------------- the parts


def test_policies_are_measured_as_evaluate_does_and_errors_are_kept(model: Any) -> None:
    documents = evaluate.tokenize(TEXTS, encode, 300 + 16 + 1, "cpu")
    settings = [Setting("rdr", 1.625), Setting("none", 0.2), Setting("none", 2.5)]
    part: dict[str, Any] = {}
    saved: list[int] = []
    args = arguments()
    lines.measure(model, settings, documents, args, part, said, lambda: saved.append(1))
    ours, broken, plain = part["lines"]
    assert "coarsest" in broken["error"]
    assert not broken["documents"]
    assert [row["name"] for row in ours["documents"]] == ["one", "two"]
    assert saved
    for record, setting in ((ours, settings[0]), (plain, settings[2])):
        for row, document in zip(record["documents"], documents, strict=True):
            exact = evaluate.run_exact(model, document, 300)
            logits, cache = evaluate.run_spherical(model, exact, setting.config(args))
            assert row["kl_mean"] == pytest.approx(exact.compare(logits).kl_mean, rel=1e-6)
            assert row["after"]["bits_per_coordinate"] == cache.bits_per_coordinate
            assert row["prefill_seconds"] > 0
    kept = ours["documents"][0]["after_prompt"]
    tokens = 2 * 2 * ((300 - 68) // 64 * 64)  # layers, heads, coded tokens
    assert sum(kept["tokens_by_tier"]) + kept["tokens_dropped"] == tokens
    mean = sum(row["kl_mean"] for row in ours["documents"]) / 2
    assert ours["summary"]["kl_mean"] == pytest.approx(mean)
    assert 0 < ours["summary"]["dropped"] < 1

    # What is there is not measured again.
    before = json.dumps(part["lines"][0])
    words: list[str] = []
    lines.measure(model, [settings[0]], documents, args, part, words.append, list)
    assert json.dumps(part["lines"][0]) == before
    assert not words


def test_a_long_generation_is_exact_where_the_cache_is(model: Any) -> None:
    """The identity codec: blocks, targets and positions line up."""
    result = generated(model, [Setting("none", 64)], codec="identity")
    row = result[0]["documents"][0]
    assert len(row["blocks"]) == 4
    assert max(block["kl_max"] for block in row["blocks"]) < 1e-8
    assert row["recoded"] is None


def generated(model: Any, settings: list[Any], **kw: Any) -> list[dict[str, Any]]:
    args = arguments(**kw)
    length = long_generation.aligned(200, 4, 64) + args.long_tokens
    texts = {"one": TEXTS["one"]}
    documents = evaluate.tokenize(texts, encode, length + 1, "cpu")
    part: dict[str, Any] = {}
    long_generation.measure(model, settings, documents, args, part, said, list)
    return part["lines"]


def test_the_first_block_is_what_a_comparison_says(model: Any) -> None:
    setting = Setting("streaming", 1.625)
    got = generated(model, [setting])[0]["documents"][0]["blocks"][0]
    prompt = long_generation.aligned(200, 4, 64)
    ids = torch.tensor(encode(TEXTS["one"]))[: prompt + 65]
    caches = (
        DynamicCache(config=model.config),
        skv.SphericalCache(model.config, prompt + 64, setting.config(arguments())),
    )
    with torch.no_grad():
        logits = [metrics.score_continuation(model, ids[:-1], prompt, cache) for cache in caches]
    wanted = metrics.compare(*logits, ids[prompt + 1 :])
    assert got == pytest.approx(wanted.to_dict(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("retention", ["none", "rdr", "h2o"])
def test_forwards_of_a_stride_are_single_steps(model: Any, retention: str) -> None:
    settings = [Setting(retention, 1.625)]
    whole, single = (generated(model, settings, step=step)[0]["documents"][0] for step in (64, 1))
    for a, b in zip(whole["blocks"], single["blocks"], strict=True):
        assert a["kl_mean"] == pytest.approx(b["kl_mean"], rel=1e-3)
    for name in ("recoded", "dropped", "stored", "counters"):
        assert whole[name] == single[name]


def test_what_is_recoded_and_dropped_is_counted_from_the_pages(model: Any) -> None:
    settings = [Setting("rdr", 1.625), Setting("streaming", 1.625), Setting("none", 0.2)]
    ours, recent, broken = generated(model, settings)
    assert "coarsest" in broken["error"]
    row = recent["documents"][0]
    assert row["recoded"] == 0  # one tier, or none
    assert row["dropped"] > 0
    row = ours["documents"][0]
    counters = row["counters"]
    assert row["recoded"] == pytest.approx(counters["recoded"] / counters["coded"])
    assert 0 < row["recoded"] < 1
    assert len(row["stored"]) == 5
    assert row["quarters"] == [block["kl_mean"] for block in row["blocks"]]
    assert row["kl_mean"] == pytest.approx(sum(row["quarters"]) / 4)
    assert ours["summary"]["bits"][-1] == row["stored"][-1]["bits_per_coordinate"]


def test_a_token_that_is_recoded_once_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    after = iter(([2, 1, 1, 0, 3], [2, 1, 1, 0, 2]))
    monkeypatch.setattr(long_generation, "_levels", lambda cache: [torch.tensor(next(after))])
    monkeypatch.setattr(long_generation, "forward", lambda *_: torch.zeros(4, VOCAB))
    row = {"blocks": [], "seconds": 0.0}
    before = [torch.tensor([2, 2, 3, 1, 0])]
    times = iter((1, 2, 2))
    monkeypatch.setattr(long_generation, "_coordinates", lambda cache: next(times))
    run = long_generation.Run(Setting("rdr", 2), {}, None, before, row, 0)
    ids = torch.zeros(4, dtype=torch.int64)
    for _ in range(3):  # at the third, nothing leaves the window
        run.block(None, ids, ids, torch.zeros(4, VOCAB), 4)
    assert (run.there, run.recoded, run.dropped) == (8, 3, 1)


# ---------------------------------------------------------------- verdict


def line(retention: str, bits: float, **kl: float) -> dict[str, Any]:
    mean = sum(kl.values()) / len(kl)
    rows = [{"name": name, "kl_mean": value} for name, value in kl.items()]
    summary = {"kl_mean": mean, "documents": len(rows)}
    name = f"{retention} {bits:g}"
    own = {"name": name, "retention": retention, "bits": bits}
    return {**own, "documents": rows, "summary": summary}


def targets(result: dict[str, Any], word: str) -> list[dict[str, Any]]:
    return [x for x in verdict.judge(result)["targets"] if word in x["what"]]


def test_policies_are_judged_by_kl_and_by_ratio() -> None:
    none = line("none", 1.125, a=0.10, b=0.02)
    ours = line("rdr", 1.125, a=0.004, b=0.004)
    result = {"policies": {"lines": [ours, none, line("rdr", 2.125, a=0.0021)]}}
    found = targets(result, "mean KL")
    assert [x["value"] for x in found] == [None, 0.004, None, 0.0021]
    assert [x["met"] for x in found] == [False, True, False, False]
    of_none = targets(result, "1.125: KL over that of none")[0]
    assert of_none["value"] == pytest.approx(0.008 / 0.12)
    assert of_none["met"]
    assert of_none["where"] == "worst b, 0.200"
    assert targets(result, "1.125: KL over that of snapkv")[0]["value"] is None
    none["documents"][0]["kl_mean"] = 0.02
    assert not targets(result, "1.125: KL over that of none")[0]["met"]


def test_a_ratio_is_of_documents_that_both_have() -> None:
    found = verdict.ratio(line("rdr", 1, a=1.0, b=9.0), line("none", 1, a=4.0, c=1.0))
    assert (found["ratio"], found["documents"]) == (0.25, 1)
    assert not found["worse_documents"]
    assert verdict.ratio(line("rdr", 1, a=1.0), line("none", 1, b=4.0)) is None
    found = verdict.ratio(line("rdr", 1, a=1.0, b=3.0), line("none", 1, a=4.0, b=2.0))
    assert found["worse_documents"] == ["b"]


@pytest.mark.parametrize(("answered", "of", "met"), [(9, 10, [1, 1]), (17, 19, [1, 0])])
def test_needles_are_judged_among_those_that_the_exact_model_finds(
    answered: int, of: int, met: list[int]
) -> None:
    own = {
        "length": 2048,
        "exact": [{"right": n < of} for n in range(20)],
        "lines": [
            {"name": "n", "retention": "none", "bits": 1.125, "answered": 0, "of": of},
            {"name": "r", "retention": "rdr", "bits": 1.125, "answered": answered, "of": of},
        ],
    }
    found = verdict.judge({"passkey": {"lengths": [own]}})["targets"]
    assert [x["met"] for x in found] == list(map(bool, met))
    own["exact"] = own["exact"][:4]
    assert not verdict.judge({"passkey": {"lengths": [own]}})["targets"][0]["met"]


def long_line(retention: str, bits: float, quarters: list[float], recoded: float) -> dict[str, Any]:
    found = line(retention, bits, a=sum(quarters) / 4)
    found["documents"][0]["quarters"] = quarters
    found["summary"] |= {"quarters": quarters, "recoded": recoded}
    return found


def test_a_long_generation_is_judged_by_its_growth_too() -> None:
    ours = long_line("rdr", 1.125, [0.004, 0.004, 0.009, 0.005], 0.019)
    none = long_line("none", 1.125, [0.1, 0.1, 0.1, 0.1], 0.0)
    result = {"long": {"lines": [ours, none]}}
    found = {x["what"]: x for x in verdict.judge(result)["targets"] if "1.125" in x["what"]}
    growth = found["rdr 1.125: highest quarter over the first"]
    assert growth["value"] == pytest.approx(2.25)
    assert not growth["met"]
    assert found["rdr 1.125: share re-coded at a refresh"]["met"]
    assert found["rdr 1.125: mean KL"]["met"]
    assert found["rdr 1.125: KL over that of none"]["met"]
    assert len(found) == 4
    assert all(x["value"] is None for x in targets(result, "2.125"))


def test_the_verdict_says_what_was_missed(capsys: pytest.CaptureFixture[str]) -> None:
    result = {"policies": {"lines": []}, "notes": ["a note"]}
    result["verdict"] = verdict.judge(result)
    verdict.show(result, Screen())
    out = capsys.readouterr().out
    assert out.count("NOT MEASURED") == 10
    assert "note: a note" in out


# ---------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents, and a model with a tokenizer of one token a character."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("benchmark")
    words = {chr(n): n for n in range(VOCAB)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex("[\\s\\S]"), "isolated")
    inner.pre_tokenizer = split
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")
    fast.save_pretrained(path / "tiny")
    tiny("llama").save_pretrained(path / "tiny")
    (path / "documents").mkdir()
    for name, content in {**TEXTS, "calib-three": "Not measured. "}.items():
        (path / "documents" / f"{name}.txt").write_text(content, encoding="utf-8")
    return path


def command(folder: Path, *more: str) -> list[str]:
    sizes = ["--prefix", "300", "--tokens", "16", "--lengths", "400", "--needles", "2"]
    sizes += ["--long-prompt", "140", "--long-tokens", "256", "--device", "cpu"]
    given = ["--model", str(folder / "tiny"), "--documents", str(folder / "documents")]
    return [*given, *sizes, "--json", str(folder / "result.json"), *more]


def test_the_script_measures_resumes_and_draws(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--bits", "1.625", "2.125", "--only", "rdr", "none", "retrieval"]
    assert retention.main(command(folder, *few, "--limit", "1")) == 0
    first = json.loads((folder / "result.json").read_text())
    assert [x["name"] for x in first["documents"]] == ["one"]
    assert {x["name"] for x in first["policies"]["lines"]} == {
        f"{policy} {bits}" for policy in ("rdr", "none", "retrieval") for bits in (1.625, 2.125)
    }
    assert len(first["passkey"]["lengths"][0]["exact"]) == 2
    assert len(first["long"]["lines"]) == 2

    again = command(folder, *few, "--parts", "policies", "long", "--resume")
    assert retention.main(again) == 0
    second = json.loads((folder / "result.json").read_text())
    for part in ("policies", "long"):
        for old, new in zip(first[part]["lines"], second[part]["lines"], strict=True):
            assert new["documents"][0] == old["documents"][0]
            assert [row["name"] for row in new["documents"]] == ["one", "two"]
    assert second["passkey"] == first["passkey"]
    assert second["command"][0] == first["command"]
    assert "--resume" in second["command"][1]
    assert "calib-three" not in json.dumps(second)

    capsys.readouterr()
    assert "rdr 2.125" in json.dumps(second["verdict"])
    with pytest.raises(UsageError, match="protocol"):
        retention.main([*again, "--prefix", "310"])
    pytest.importorskip("matplotlib")
    importlib.import_module("plot_retention").main([str(folder / "result.json")])
    for suffix in ("png", "svg"):
        assert (folder / f"result.{suffix}").stat().st_size > 1000


def test_resuming_refuses_a_changed_document() -> None:
    head = dict.fromkeys(("model", "dtype", "protocol", "device"), "same")
    old = {**head, "documents": [{"name": "a", "sha256": "1"}, {"name": "b", "sha256": "2"}]}
    new = {**head, "documents": [{"name": "a", "sha256": "1"}]}
    kept = retention.resumed({**old, "long": {"lines": [1]}}, new)
    assert kept["long"] == {"lines": [1]}
    assert [x["name"] for x in kept["documents"]] == ["a", "b"]
    new["documents"][0]["sha256"] = "other"
    with pytest.raises(UsageError, match="document a has changed"):
        retention.resumed(old, new)


def test_arguments_that_cannot_be_meant_are_refused() -> None:
    for more in (["--long-tokens", "100"], ["--step", "7"], ["--parts", "nothing"]):
        with pytest.raises(SystemExit):
            retention.parse(more)
    assert retention.parse([]).long_prompt == 1028
