"""``skv eval`` and ``skv explain`` on a tiny model: settings of retention, and the picture."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from support import saved, tiny

from skv_compile import cli
from skv_compile.commands import COMMANDS, common
from skv_compile.config import CODECS, Config
from skv_compile.retention.policies import POLICIES

SENTENCE = "A sphere has no edges, only directions. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("model") / "tiny", tiny("llama", layers=3))


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "sphere.txt").write_text(SENTENCE * 20, encoding="utf-8")
    return str(tmp_path / "sphere.txt")


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """A command that succeeds, and its JSON."""
    file = tmp_path / "result.json"
    assert cli.main([*arguments, "--json", str(file)]) == 0
    return json.loads(file.read_text(encoding="utf-8"))


def evaluated(folder: str, text: str, *more: str) -> list[str]:
    lengths = ["--prefix", "320", "--tokens", "16"]
    return ["eval", "--model", folder, "--documents", text, *lengths, *more]


@pytest.mark.parametrize("retention", ["rdr", "streaming", "none"])
def test_eval_measures_a_policy(
    folder: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], retention: str
) -> None:
    arguments = evaluated(folder, text, "--retention", retention, "--bits", "2.5")
    result = run(tmp_path, *arguments)
    assert result["config"]["retention"] == retention
    assert result["cost"]["bits_per_coordinate"] <= 2.5
    said = capsys.readouterr().out
    assert f"retention {retention}" in said
    assert ("dropped" in said) == (retention != "none")
    assert ("tokens_by_tier" in result["cost"]) == (retention != "none")


def test_eval_takes_a_budget(folder: str, text: str, tmp_path: Path) -> None:
    sizes = []
    for budget in ("165KB", "180KB"):
        result = run(tmp_path, *evaluated(folder, text, "--budget", budget))
        assert result["config"]["budget"] == budget
        sizes.append(result["cost"]["resident_bytes"])
    assert 10_000 < sizes[1] - sizes[0] < 20_000


def test_eval_takes_a_table_of_heads(folder: str, text: str, tmp_path: Path) -> None:
    table = str(tmp_path / "heads.json")
    assert cli.main(["calibrate", folder, "--retrieval-heads", table, "--tokens", "256"]) == 0
    more = ("--retention", "retrieval", "--retention-table", table, "--bits", "2.125")
    result = run(tmp_path, *evaluated(folder, text, *more))
    assert result["config"]["retention_table"] == table


@pytest.mark.parametrize("command", ["eval", "demo", "generate", "chat"])
def test_settings_are_refused_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    prompt = ["--prompt", "x"] if command == "generate" else []
    for more, word in (
        (("--retention", "snapk"), "snapkv"),
        (("--budget", "much"), "budget='much'"),
        (("--retention", "retrieval"), "retention_table"),
    ):
        named = ["no/such/model"] if command == "chat" else ["--model", "no/such/model"]
        assert cli.main([command, *named, *prompt, *more]) == 2
        assert word in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "demo", "generate", "explain"])
def test_commands_share_the_settings_of_the_cache(command: str) -> None:
    more = {"generate": ["--prompt", "x"], "explain": ["demo"]}.get(command, [])
    given = ["--bits", "2.5", "--codec", "grid", "--retention", "h2o", "--budget", "1GiB"]
    args = cli.build_parser().parse_args([command, *more, *given])
    wanted = {"bits": 2.5, "codec": "grid", "retention": "h2o", "budget": "1GiB"}
    assert common.overrides(args) == wanted


@pytest.mark.parametrize("command", ["chat", "eval", "demo", "generate", "explain"])
def test_the_help_names_what_settings_there_are(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for word in (*POLICIES, *CODECS, f"({Config().bits:g})", f"{Config().retention} (the default)"):
        assert word in said
    assert f"{Config().codec} (the default)" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = cli.build_parser()
    commands = next(x for x in parser._actions if isinstance(x, argparse._SubParsersAction))
    for action in commands.choices[name]._actions:
        assert action.help, f"skv {name} {action.option_strings or action.dest}"


def test_skv_alone_says_where_to_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    said = capsys.readouterr().out
    assert "start here" in said
    assert all(name in said for name in COMMANDS)


@pytest.mark.parametrize(
    ("error", "word"),
    [
        ("InvalidCxxCompiler: No working C++ compiler found", "Install g++"),
        ("OutOfMemoryError", "does not fit"),
    ],
)
def test_what_the_machine_lacks_is_said_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: str, word: str
) -> None:
    kind = type("OutOfMemoryError" if "Memory" in error else "InductorError", (Exception,), {})

    def fails(*_: Any) -> None:
        raise kind(error)

    monkeypatch.setattr("skv_compile.doctor.collect", fails)
    assert cli.main(["doctor"]) == 2
    said = capsys.readouterr().err
    assert word in said
    assert "Traceback" not in said


@pytest.mark.parametrize("retention", ["rdr", "none"])
def test_explain_draws_what_is_kept(
    folder: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], retention: str
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "map.png"
    more = ["--bits", "2.125", "--retention", retention, "--documents", text, "--prefix", "500"]
    result = run(tmp_path, "explain", folder, "--retention-map", str(picture), *more)
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = result["retention_map"]
    assert (found["document"], found["prefix_tokens"]) == ("sphere", 500)
    assert found["config"]["retention"] == retention
    assert found["tokens"] == (500 - 68) // 64 * 64
    assert list(found["bits"]) == ["0", "1", "2"]
    mean = sum(sum(heads) for heads in found["bits"].values()) / 6
    assert mean == pytest.approx(found["bits_per_coordinate"], abs=2e-3)
    assert (found["shares"]["dropped"] > 0) == (retention != "none")
    assert sum(found["shares"].values()) == pytest.approx(1, abs=1e-4)
    assert len(result["report"]["sites"]) == 3
    assert "map.png" in capsys.readouterr().out


def test_explain_without_a_picture_is_what_it_was(folder: str, tmp_path: Path) -> None:
    result = run(tmp_path, "explain", folder)
    assert "retention_map" not in result


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--retention-map", "m.png", "--prefix", "5000"], "makes 800 tokens"),
        (["--retention-map", "m.png", "--prefix", "60"], "--prefix 60: nothing is compressed"),
        (["--retention-map", "m.txt"], "end it in .png"),
        (["--retention-map", "no/m.png"], "can be written"),
        (["--retention-map", "m.png", "--bits", "0"], "bits"),
        (["--retention-map", "m.png", "--documents", "none.txt"], "none.txt"),
        (["--prefix", "100"], "--prefix is for --retention-map"),
        (["--documents", "sphere.txt"], "--documents is for --retention-map"),
    ],
)
def test_explain_refuses(
    folder: str,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    word: str,
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    if "--documents" not in more and "--retention-map" in more:
        more = [*more, "--documents", text]
    assert cli.main(["explain", folder, *more]) == 2
    assert word in capsys.readouterr().err
    assert not (tmp_path / "m.png").exists()
