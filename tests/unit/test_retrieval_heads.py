"""The table of retrieval heads: measured, saved, loaded, refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import padded_batch, tiny

import skv_compile as skv
from skv_compile import cli, models
from skv_compile.errors import ConfigError, SkvError, UnsupportedError
from skv_compile.retention.policies import make_policy
from skv_compile.retention.policies.retrieval import Retrieval
from skv_compile.retention.table import _Listener, load_table, measure_heads, save_table


def test_a_table_gives_back_what_was_saved(tmp_path: Path) -> None:
    file, table = tmp_path / "heads.json", ((0.25, 1.0), (0.0, -3.5))
    save_table(file, table, model="tiny")
    assert json.loads(file.read_text())["model"] == "tiny"
    assert load_table(file) == table
    config = skv.Config(retention="retrieval", retention_table=file)
    assert config.retention_table == str(file)
    assert dataclasses.replace(config, bits=2.0).retention_table == str(file)
    assert make_policy(config, 2, 2) == make_policy(config) == Retrieval(table=table)
    with pytest.raises(ConfigError, match="another model"):
        make_policy(config, 2, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["heads.json"]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[]", "not a table"),
        ('{"format": "another", "version": 1, "scores": [[1]]}', "not a table"),
        ('{"format": "skv retrieval heads", "version": 7}', "version 7"),
        *(
            (f'{{"format": "skv retrieval heads", "version": 1, "scores": {rows}}}', word)
            for rows, word in (
                ("[]", "list of layers"),
                ("[[]]", "list of layers"),
                ("[1, 2]", "list of layers"),
                ("[[1, 2], [3]]", "different numbers"),
                ("[[1, NaN]]", "layer 0, head 1 is nan"),
                ("[[1], [1e999]]", "layer 1, head 0 is inf"),
                ("[[true]]", "True"),
                ('[["1"]]', "'1'"),
            )
        ),
    ],
)
def test_a_bad_table_is_refused(tmp_path: Path, content: str | None, word: str) -> None:
    file = tmp_path / "heads.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=word) as caught:
        make_policy(skv.Config(retention="retrieval", retention_table=str(file)))
    assert f"skv calibrate MODEL --retrieval-heads {file}" in str(caught.value)


def test_a_config_has_a_table_with_retrieval_and_only_there() -> None:
    with pytest.raises(ConfigError, match=r"needs retention_table=FILE.*skv calibrate"):
        skv.Config(retention="retrieval")
    for other in ({}, {"retention": "rdr"}, {"codec": "identity"}):
        with pytest.raises(ConfigError, match="Leave one of the two out"):
            skv.Config(retention_table="heads.json", **other)
    for wrong in ("", 3, True):
        with pytest.raises(ConfigError, match=r"retention_table=.*expected the name"):
            skv.Config(retention="retrieval", retention_table=wrong)


def test_a_head_that_finds_the_earlier_occurrence_scores_high() -> None:
    half, dim = 64, 64
    place = 20 * torch.eye(half, dim)
    q = torch.cat([place, place])
    after = place.roll(1, 0)  # the key of a token is found by the token before it
    keys = torch.stack([q, torch.cat([after, after]), 0 * q, q.flip(0)])
    listener = _Listener(half, 4)
    score = listener._score(q.expand(4, -1, -1), keys, 1.0)
    # Half of the attention, as the token itself, or the repetition's, matches as well.
    assert score[0] == pytest.approx(0.5, abs=0.01)
    assert score[1] == pytest.approx(1.0, abs=0.02)
    assert score[2] == pytest.approx(2 / 98, abs=0.005)
    assert score[3] < 0.05
    grouped = _Listener(half, 2)._score(q.expand(4, -1, -1), keys, 1.0)
    assert torch.equal(grouped, score.view(2, 2).amax(1))


def test_heads_are_measured_on_the_model_alone() -> None:
    model = tiny("llama")
    table = measure_heads(model, 256)
    assert table == measure_heads(model, 256)
    assert (len(table), *map(len, table)) == (2, 2, 2)
    assert all(0 < x < 1 for row in table for x in row)
    assert len(measure_heads(tiny("gemma3"), 256)) == 1  # sliding layers are not compressed
    assert len(measure_heads(tiny("gpt2"), 256)[0]) == 4
    with pytest.raises(UnsupportedError, match="at least 256 tokens"):
        measure_heads(model, 100)
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedError, match=r"0 of the 2 layers.*attn_implementation='sdpa'"):
        measure_heads(model, 256)


def test_the_command_writes_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny("llama")
    loaded = SimpleNamespace(model=model, device=model.device, tokenizer=None)
    monkeypatch.setattr(models, "load", lambda *_, **__: loaded)
    monkeypatch.chdir(tmp_path)
    for arguments, word in (
        ([], "--retrieval-heads FILE"),
        (["--text", "a.txt"], "--out"),
        (["--out", "f"], "--text FILE"),
        (["--out", "f", "--retrieval-heads", "h"], "--text FILE"),
        (["--retrieval-heads", "."], "folder"),
        (["--retrieval-heads", "no/such/h.json"], "--retrieval-heads"),
        (["--retrieval-heads", "h.json", "--tokens", "20"], "at least 256"),
    ):
        assert cli.main(["calibrate", "tiny", *arguments]) == 2
        assert word in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    arguments = ["--retrieval-heads", "h.json", "--tokens", "256", "--json", "r.json"]
    assert cli.main(["calibrate", "tiny", *arguments]) == 0
    assert load_table("h.json") == measure_heads(model, 256)
    assert json.loads(Path("r.json").read_text())["retrieval_heads"] == "h.json"
    assert "retention_table='h.json'" in capsys.readouterr().out


def test_a_table_of_another_model_is_refused_by_the_cache(tmp_path: Path) -> None:
    model, file = tiny("llama", layers=4), str(tmp_path / "heads.json")
    save_table(file, ((0.1, 0.9), (0.5, 0.3)))
    config = skv.Config(retention="retrieval", retention_table=file, recent=12)
    cache = skv.SphericalCache(model.config, max_cache_len=400, config=config)
    with torch.no_grad(), pytest.raises(SkvError, match=r"2 layers with 2 kv heads.*has 4"):
        model(padded_batch(1, 210)[0], past_key_values=cache)
