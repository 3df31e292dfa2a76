"""The examples run as scripts and say what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def slow(*values: str) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


def environment() -> dict[str, str]:
    """One thread, and this tree wherever the package is installed from."""
    path = os.pathsep.join([str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def run(name: str) -> str:
    done = subprocess.run(
        [sys.executable, name], cwd=EXAMPLES, capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "promise"),
    [
        ("own_module.py", "bytes of the key buffer: 2097152 -> 4"),
        ("decorator.py", "largest difference to the dense module:"),
        slow("generate.py", r"bits_per_coordinate +2\.12(5|[0-4]\d*)\n"),  # nearly all of the bits
        slow("new_policy.py", r"retention +fading\nbits_per_coordinate +1\.6(25|[0-2]\d*)\n"),
    ],
)
def test_an_example_runs(name: str, promise: str) -> None:
    assert re.search(promise, run(name))


@pytest.mark.slow
def test_a_budget_holds_while_bits_fall() -> None:
    rows = [line.split() for line in run("budget.py").splitlines()[1:]]
    bits = [float(row[3]) for row in rows]
    taken = {int(row[2].replace(",", "")) for row in rows}
    assert [int(row[0]) for row in rows] == list(range(512, 2049, 512))
    assert len(taken) == 1
    assert max(taken) <= 15_000_000
    assert bits == sorted(bits, reverse=True)
    assert bits[-1] < 0.5 * bits[0]


@pytest.mark.slow
def test_policies_are_compared_at_the_same_bits() -> None:
    rows = {line.split()[0]: line.split()[1:] for line in run("choose_policy.py").splitlines()[1:]}
    assert set(rows) == {"rdr", "snapkv"}
    bits, kl = ([float(rows[name][n]) for name in ("rdr", "snapkv")] for n in (0, 1))
    assert max(bits) <= 1.625
    assert abs(bits[0] - bits[1]) < 0.1
    assert 0 < kl[0] < kl[1]


@pytest.mark.slow
def test_a_saved_frame_serves_a_short_prompt() -> None:
    kl = dict(re.findall(r"^(no frame|saved) +KL ([\d.]+)", run("saved_frame.py"), re.M))
    assert 0 < float(kl["saved"]) < 0.5 * float(kl["no frame"])


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(EXAMPLES / "pareto.ipynb", as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(EXAMPLES)}}
    ).execute()
    outputs = [x for cell in notebook.cells for x in cell.get("outputs", [])]
    pictures = [x for x in outputs if "image/png" in x.get("data", {})]
    assert len(pictures) == 2
    text = "".join(x.get("text", "") for x in outputs)
    kl = {
        (name, float(bits)): float(found)
        for name, bits, found in re.findall(r"^(rdr|none) +([\d.]+): .* KL ([\d.]+)$", text, re.M)
    }
    assert 0 < kl["rdr", 2.125] < kl["rdr", 1.125]
    assert kl["rdr", 2.125] < kl["none", 2.125]
