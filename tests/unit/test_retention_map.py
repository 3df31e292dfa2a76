"""What a cache has kept, as arrays and as a picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import VOCAB, padded_batch, tiny

import skv_compile as skv
from skv_compile.retention import map as drawing

TOKENS = 400
SIZES = {"sinks": 4, "recent": 16}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", layers=3)


def filled(model: Any, tokens: int = TOKENS, **kw: Any) -> skv.SphericalCache:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB, (1, tokens), generator=generator)
    cache = skv.SphericalCache(model.config, tokens, **(SIZES | kw))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


def coded(cache: skv.SphericalCache, row: int = 0) -> int:
    return int(cache.states[0].tensors.meta[row, 2])


@pytest.mark.parametrize("retention", ["rdr", "snapkv"])
def test_the_map_agrees_with_what_the_cache_says_of_itself(model: Any, retention: str) -> None:
    cache = filled(model, retention=retention, bits=1.625)
    found = drawing.retention_map(cache)
    assert found["layers"].tolist() == [0, 0, 1, 1, 2, 2]
    assert found["heads"].tolist() == [0, 1] * 3
    assert found["levels"].shape == (6, coded(cache))
    assert found["first"] == SIZES["sinks"]
    summary = cache.summary()
    counts = np.bincount(found["levels"].ravel(), minlength=len(found["tiers"]) + 1).tolist()
    assert counts == [summary["tokens_dropped"], *summary["tokens_by_tier"]]
    assert counts[0] > 0
    assert found["bits"].mean() == pytest.approx(cache.bits_per_coordinate, abs=1e-3)
    # Full pages are the least that a head can take.
    rates = np.array([0, *found["rates"]])
    assert (found["bits"] >= rates[found["levels"]].mean(1) - 1e-9).all()


def test_tokens_stand_where_they_were_kept(model: Any) -> None:
    found = drawing.retention_map(filled(model, retention="streaming", bits=1.625))
    for row in found["levels"]:
        kept = row.nonzero()[0]
        assert 0 < len(kept) < len(row)
        assert kept.tolist() == list(range(len(row) - len(kept), len(row)))  # the most recent
        assert set(row[kept].tolist()) == {len(found["tiers"])}


@pytest.mark.parametrize(("codec", "bits", "rate"), [("frame", 2.125, None), ("identity", 64, 32)])
def test_without_retention_there_is_one_tier(
    model: Any, codec: str, bits: float, rate: float | None
) -> None:
    cache = filled(model, codec=codec, bits=bits, retention="none")
    found = drawing.retention_map(cache)
    assert len(found["tiers"]) == 1
    assert (found["levels"] == 1).all()
    assert found["levels"].shape == (6, coded(cache))
    assert found["bits"].tolist() == [rate or cache.bits_per_coordinate] * 6


def test_a_row_of_a_padded_batch(model: Any) -> None:
    ids, mask = padded_batch(2, 200)
    cache = skv.SphericalCache(model.config, 200, retention="rdr", bits=2.125, **SIZES)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=position, past_key_values=cache)
    pad = int((mask[1] == 0).sum())
    first, second = (drawing.retention_map(cache, row) for row in (0, 1))
    assert (first["first"], second["first"]) == (4, 4 + pad)
    assert first["levels"].shape[1] == coded(cache, 0)
    assert second["levels"].shape[1] == coded(cache, 1)
    counts = sum(int((x["levels"] > 0).sum()) for x in (first, second))
    assert counts == sum(cache.summary()["tokens_by_tier"])


def test_layers_have_the_numbers_of_the_model() -> None:
    model = tiny("gemma3", layers=4)
    found = drawing.retention_map(filled(model, bits=2.125))
    assert sorted(set(found["layers"].tolist())) == [1, 3]


def test_nothing_compressed_is_said(model: Any) -> None:
    for cache in (filled(model, 30), skv.SphericalCache(model.config, 30)):
        with pytest.raises(skv.CacheStateError, match="Run a longer text"):
            drawing.retention_map(cache)


def made_up() -> dict[str, Any]:
    levels = np.array([[0, 0, 1, 1, 2, 2, 2, 2, 0, 1], [1] * 10], dtype=np.uint8)
    return {
        "layers": np.array([5, 7]),
        "heads": np.array([0, 0]),
        "levels": levels,
        "tiers": ["low", "high"],
        "rates": [1.0, 3.0],
        "bits": np.array([1.5, 1.25]),
        "first": 100,
    }


def test_bins_are_means_over_positions() -> None:
    bits, shares, edges = drawing.binned(made_up(), 5)
    assert edges.tolist() == [100, 102, 104, 106, 108, 110]
    assert bits.tolist() == [[0, 1, 3, 3, 0.5], [1, 1, 1, 1, 1]]
    assert shares.tolist() == [
        [0.5, 0, 0, 0, 0.25],
        [0.5, 1, 0.5, 0.5, 0.75],
        [0, 0, 0.5, 0.5, 0],
    ]
    bits, shares, edges = drawing.binned(made_up(), 3)  # bins of 3, 4 and 3 tokens
    assert np.diff(edges).tolist() == [3, 4, 3]
    assert bits[0].tolist() == pytest.approx([1 / 3, 10 / 4, 4 / 3])
    assert shares.sum(0).tolist() == pytest.approx([1, 1, 1])
    assert drawing.binned(made_up(), 99)[0].shape == (2, 10)


def test_the_compact_form_is_plain_and_small() -> None:
    found = json.loads(json.dumps(drawing.compact(made_up(), 5)))
    assert found["bits"] == {"5": [1.5], "7": [1.25]}
    assert found["shares"] == {"dropped": 0.15, "low": 0.65, "high": 0.2}
    assert found["rates"] == {"low": 1.0, "high": 3.0}
    assert found["shares_by_position"]["high"] == [0, 0, 0.5, 0.5, 0]
    assert len(found["positions"]) == 6


@pytest.mark.parametrize("retention", ["rdr", "none"])
def test_a_picture_is_drawn(model: Any, tmp_path: Path, retention: str) -> None:
    pytest.importorskip("matplotlib")
    found = drawing.retention_map(filled(model, retention=retention, bits=2.125))
    for name, begins in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        drawing.draw(found, str(tmp_path / name), "a title")
        assert (tmp_path / name).read_bytes().startswith(begins)


def test_a_picture_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "folder.png").mkdir()
    for name, word in (
        ("a.txt", "end it in .png"),
        ("a", "end it in .png"),
        ("no/a.png", "can be written"),
        ("folder.png", "a folder"),
    ):
        with pytest.raises(drawing.DrawingError, match=word):
            drawing.check_drawing(str(tmp_path / name))
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    with pytest.raises(drawing.DrawingError, match=r"skv-compile\[bench\]"):
        drawing.check_drawing(str(tmp_path / "a.png"))
