"""A model split over two processes (gloo) is the model in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "tests" / "tensor_parallel.py"
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

pytestmark = pytest.mark.slow


def run(*words: str) -> str:
    """What a script prints, in one thread a process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small Llama whose logits say something."""
    folder = str(tmp_path_factory.mktemp("model"))
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(**sizes, **heads, initializer_range=0.08, eos_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_two_processes_are_one(model: str) -> None:
    (one,) = json.loads(run(str(WORKER), model).splitlines()[-1])
    two: list[dict[str, Any]] = json.loads(run(*TWO, str(WORKER), model).splitlines()[-1])
    assert len(two) == 2
    for rank in two:
        assert rank["compiled"] == rank["dense"] == one["dense"]
        uniform, alone = rank["uniform"], one["uniform"]
        assert (uniform["heads"], alone["heads"]) == (2, 4)
        # Every head is coded by itself: where it is does not matter.
        assert uniform["kl"] == pytest.approx(alone["kl"], rel=1e-3)
        assert uniform["bytes"] <= 0.6 * alone["bytes"]
        # The budget is of a rank, so that two of them hold twice of it and lose less.
        assert rank["budget"]["bytes"] <= 210_000
        assert 0 < rank["budget"]["kl"] < one["budget"]["kl"]
    assert two[0]["budget"]["kl"] == pytest.approx(two[1]["budget"]["kl"])  # one output


def test_the_example_runs() -> None:
    lines = run(*TWO, str(ROOT / "examples" / "tensor_parallel.py")).splitlines()
    ranks = sorted(line for line in lines if line.startswith("rank"))
    assert [line.split(",")[0] for line in ranks] == ["rank 0: 2 kv heads", "rank 1: 2 kv heads"]
    assert len({line.partition("last tokens")[2] for line in ranks}) == 1
