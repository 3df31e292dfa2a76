"""Runs of the retention benchmark joined into one JSON."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from skv_compile.commands.common import UsageError

FOLDER = str(Path(__file__).parents[2] / "benchmarks")
if FOLDER not in sys.path:
    sys.path.append(FOLDER)


def test_runs_of_other_documents_and_lines_are_joined_and_counted_once() -> None:
    merge = importlib.import_module("merge_retention")

    def run(name: str, *policies: str) -> dict[str, Any]:
        row = {"name": name, "prefill_seconds": 1.0, "prefill_seconds_without": None}
        row |= dict.fromkeys(("kl_stderr", "kl_max", "delta_ppl"), 0.0)
        row |= {"tokens": 1, "kl_mean": float(len(name)), "same_top1": 1.0}
        row |= {end: {"bits_per_coordinate": 1.0} for end in ("after_prompt", "after")}
        lines = [
            {"name": f"{p} 2", "retention": p, "bits": 2.0, "documents": [dict(row)]}
            for p in policies
        ]
        head = {"model": "m", "dtype": "float32", "protocol": {}, "device": "cpu", "notes": ["n"]}
        head["versions"] = {"torch": "2" if policies[-1] == "none" else "1"}
        documents = [{"name": name, "sha256": name}]
        command = f"python benchmarks/retention.py --documents /some/where/{name}"
        own = {"documents": documents, "command": command, "policies": {"lines": lines}}
        return head | own

    joined = merge.merge([run("a", "rdr"), run("bbb", "rdr", "none"), run("a", "rdr")])
    assert [x["name"] for x in joined["documents"]] == ["a", "bbb"]
    rdr, none = joined["policies"]["lines"]
    assert [row["name"] for row in rdr["documents"]] == ["a", "bbb"]
    assert rdr["summary"]["kl_mean"] == 2.0
    assert [row["name"] for row in none["documents"]] == ["bbb"]
    assert joined["command"][1] == "python benchmarks/retention.py --documents bbb"
    assert joined["versions"] == {"torch": "1; 2"}
    other = run("c", "rdr") | {"dtype": "bfloat16"}
    with pytest.raises(UsageError, match="dtype"):
        merge.merge([run("a", "rdr"), other])


def test_needles_of_other_lengths_are_joined_and_lines_come_in_the_order_of_the_settings() -> None:
    merge = importlib.import_module("merge_retention")

    def run(length: int, *names: str) -> dict[str, Any]:
        lines = [
            {"name": x, "retention": x.split()[0], "bits": float(x.split()[1]), "documents": []}
            for x in names
        ]
        return {
            **{"model": "m", "dtype": "float32", "protocol": {}, "device": "cpu", "notes": []},
            **{"documents": [], "command": "python benchmarks/retention.py", "versions": {}},
            "policies": {"lines": lines},
            "passkey": {"lengths": [{"length": length, "exact": [], "lines": []}]},
        }

    joined = merge.merge([run(4096, "none 1.125", "odd 9"), run(2048, "rdr 1.125"), run(4096)])
    assert [x["length"] for x in joined["passkey"]["lengths"]] == [2048, 4096]
    names = [line["name"] for line in joined["policies"]["lines"]]
    assert names == ["rdr 1.125", "none 1.125", "odd 9"]
