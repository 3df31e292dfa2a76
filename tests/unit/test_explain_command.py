"""``skv explain``: the table, the page and the graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_commands import folder, run  # noqa: F401

from skv_compile import cli


def test_explain_prints_a_table_a_page_and_graphs(
    folder: str,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page, graphs = tmp_path / "look.html", tmp_path / "graphs"
    result = run(tmp_path, "explain", folder, "--html", str(page), "--dump", str(graphs))
    sites = result["report"]["sites"]
    assert len(sites) == 3
    said = capsys.readouterr().out
    assert "0-2" in said
    assert "3 of 3 attentions with a cache rewritten" in said
    assert sites[0]["kernel"] in said
    assert "\x1b" not in said
    for name in (str(page), str(graphs)):
        assert f"{name}: " in said
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert text.count(">rewritten</td>") == 3
    assert len(list(graphs.glob("*_repro.py"))) == 1
    assert {site["max_tokens"] for site in sites} == {4096}
    assert result["report"]["settings"]["retention"] == "rdr"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--html", "no/look.html"], "--html no/look.html: the folder no does not exist"),
        (["--html", "."], "--html .: this is a folder"),
        (["--dump", "file"], "dump='file': File exists"),
        (["--dump", "file/inside"], "dump='file/inside': Not a directory"),
    ],
)
def test_explain_refuses_what_cannot_be_written_before_a_model_is_loaded(
    more: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert cli.main(["explain", "no/such/model", *more]) == 2
    assert words in capsys.readouterr().err
