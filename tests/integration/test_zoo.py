"""docs/models.md is what happens: every decoder of transformers with a compressed cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from zoo import table
from zoo.tiny import architectures
from zoo.trial import FAILED, REFUSED, REWRITTEN, trial

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results" / "models.json"

#: Those that fail and should not.
BUGS: set[str] = set()

#: Latent attention, values changed after the cache, sliding layers beside full ones, an old GPT,
#: a hybrid, a plain one, linear attention only, a mixture of experts, learned positions.
QUICK = (
    "deepseek_v3",
    "diffllama",
    "gemma3_text",
    "gpt2",
    "jamba",
    "llama",
    "mamba",
    "mixtral",
    "opt",
)


@pytest.fixture(autouse=True)
def _documented() -> None:
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    other = [f"{k} {v}" for k, v in versions.items() if f"{k} {v}" not in TEXT]
    if other:  # another version has other models, and other faults
        pytest.skip(f"docs/models.md is of other versions than {' and '.join(other)}")


@pytest.mark.parametrize(
    "name",
    [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in architectures()],
)
def test_the_documented_row_is_what_happens(name: str) -> None:
    assert table.line(trial(name)) == table.lines_of(TEXT)[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gemma3_text"])
def test_inductor_makes_no_difference(name: str) -> None:
    row = trial(name, inner="inductor", seconds=600)
    assert table.line(row) == table.lines_of(TEXT)[name]


def test_every_decoder_has_its_row() -> None:
    assert list(table.lines_of(TEXT)) == sorted(architectures())


def test_none_fails_that_is_not_known_to_and_enough_are_rewritten() -> None:
    results = {name: x.split(" | ")[2] for name, x in table.lines_of(TEXT).items()}
    assert {name for name, result in results.items() if result == FAILED} == BUGS
    assert sum(x in (REWRITTEN, REFUSED) for x in results.values()) >= 60


def test_a_lost_past_would_have_been_seen() -> None:
    rows = table.from_json(json.loads(RESULTS.read_text(encoding="utf-8")))
    assert {name: table.line(row) for name, row in rows.items()} == table.lines_of(TEXT)
    blind = [r.architecture for r in rows.values() if r.result == REWRITTEN and r.past < 0.01]
    assert not blind
