"""Real weights, a real document: what the codecs cost in KL."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StaticCache

import skv_compile as skv
from skv_compile import metrics, models, text
from skv_compile.config import PRESETS, PROMISES

PREFIX, TOKENS = 1500, 256

#: Mean KL in nats that each setting must stay under.
BOUNDS = {
    ("identity", 32.0): 1e-6,
    ("grid", 4.125): 0.01,
    ("grid", 2.125): 0.12,
    ("rings", 3.125): 0.02,
    ("frame", 4.125): 0.0013,
    ("frame", 2.125): 0.012,
}


@pytest.fixture(scope="module")
def exact() -> Iterator[tuple[Any, torch.Tensor, torch.Tensor]]:
    """The demo model, a document's token ids [1, N + 1], and exact logits [TOKENS, vocabulary]."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        loaded = models.load("demo")
    except models.ModelError as error:
        pytest.skip(f"the demo model cannot be had here: {error}")
    ids = loaded.tokenizer(text.document(), return_tensors="pt")["input_ids"]
    ids = ids[:, : PREFIX + TOKENS + 1]
    assert ids.shape[1] == PREFIX + TOKENS + 1
    cache = StaticCache(config=loaded.model.config, max_cache_len=ids.shape[1])
    logits = metrics.score_continuation(loaded.model, ids[:, :-1], PREFIX, cache)
    yield loaded.model, ids, logits
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize(("codec", "bits"), BOUNDS, ids=lambda x: str(x))
def test_kl_of_a_continuation_scored_through_the_cache(exact, codec: str, bits: float) -> None:
    model, ids, logits = exact
    config = skv.Config(codec=codec, bits=bits, retention="none")
    cache = skv.SphericalCache(model.config, ids.shape[1], config)
    got = metrics.score_continuation(model, ids[:, :-1], PREFIX, cache)
    found = metrics.compare(logits, got, ids[0, PREFIX + 1 :])
    assert found.kl_mean <= BOUNDS[codec, bits], str(found)
    assert cache.bits_per_coordinate == pytest.approx(bits, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMISES)
def test_a_preset_keeps_its_promise(name: str) -> None:
    loaded = models.load("demo")
    ids = loaded.tokenizer(text.document(), return_tensors="pt")["input_ids"][:, : 3072 + TOKENS]
    assert ids.shape[1] == 3072 + TOKENS
    model = loaded.model
    dense = StaticCache(config=model.config, max_cache_len=ids.shape[1])
    exact = metrics.score_continuation(model, ids[:, :-1], 3072, dense)
    skv.compile(model, skv.Config.preset(name))  # retention looks at queries
    cache = skv.SphericalCache(model.config, ids.shape[1], skv.Config.preset(name))
    got = metrics.score_continuation(model, ids[:, :-1], 3072, cache)
    found = metrics.compare(exact, got, ids[0, 3073:])
    assert found.kl_mean <= PROMISES[name], str(found)


def test_promises_are_what_was_measured() -> None:
    file = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "retention.json"
    lines = json.loads(file.read_text())["policies"]["lines"]
    found = {x["bits"]: x["summary"]["kl_mean"] for x in lines if x["retention"] == "rdr"}
    for name, settings in PRESETS.items():
        if "bits" in settings:
            assert found[settings["bits"]] <= PROMISES[name] <= 3 * found[settings["bits"]]
