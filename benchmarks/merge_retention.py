"""Join the JSON of several runs of retention.py, each of its own documents, lines or parts.

    python benchmarks/merge_retention.py OUT.json RUN.json RUN.json ...

The runs must have the same model, dtype and protocol. A (line, document) that two of them have is
taken from the first.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import long_generation
import retention
import retention_lines
import retention_verdict

from skv_compile.commands import common

Record = dict[str, Any]


def merge(runs: list[Record]) -> Record:
    """One record of all of them, judged anew; ``command`` is a list, one for each run."""
    out: Record = runs[0]
    said = [command for run in runs for command in retention.commands(run)]
    for run in runs[1:]:
        names = {x["name"] for x in out["documents"]}
        new = [x for x in run["documents"] if x["name"] not in names]
        both = {**run, "documents": out["documents"] + new}
        joined = retention.resumed(out, both)
        for part, summarise in PARTS.items():
            if part in run:
                _add(joined.setdefault(part, {}), run[part], summarise)
        if "passkey" in run:
            joined.setdefault("passkey", run["passkey"])
            _add_needles(joined["passkey"], run["passkey"])
        joined["versions"] = {
            name: "; ".join(dict.fromkeys(str(run["versions"].get(name)) for run in runs))
            for name in out["versions"]
        }
        joined["notes"] = list(dict.fromkeys(out["notes"] + run["notes"]))
        out = joined
    for part, settings in ORDER.items():
        place = {setting.name: n for n, setting in enumerate(settings)}
        lines = out.get(part, {}).get("lines", [])
        lines.sort(key=lambda line, place=place: place.get(line["name"], len(place)))
    out["command"] = [named_only(command) for command in said]
    out["verdict"] = retention_verdict.judge(out)
    return out


PARTS: dict[str, Callable[[list[Record]], Record]] = {
    "policies": retention_lines.summarise,
    "long": long_generation.summarise,
}

ORDER = {"policies": retention_lines.policy_settings(), "long": long_generation.SETTINGS}


def named_only(command: str) -> str:
    """A command without the folders of the machine that ran it."""
    return shlex.join(re.sub(r"^/.*/", "", word) for word in shlex.split(command))


def _add(own: Record, other: Record, summarise: Callable[[list[Record]], Record]) -> None:
    """Take lines and documents over that are not there yet."""
    lines = own.setdefault("lines", [])
    for line in other["lines"]:
        mine = next((x for x in lines if x["name"] == line["name"]), None)
        if mine is None:
            lines.append(line)
            continue
        have = retention_lines.measured(mine)
        mine["documents"] += [row for row in line["documents"] if row["name"] not in have]
        if mine["documents"]:
            mine["summary"] = summarise(mine["documents"])


def _add_needles(own: Record, other: Record) -> None:
    """Take the lengths of prompts over that are not there yet."""
    have = {x["length"] for x in own["lengths"]}
    own["lengths"] += [x for x in other["lengths"] if x["length"] not in have]
    own["lengths"].sort(key=lambda x: x["length"])


def main(argv: list[str]) -> None:
    """Read, join, write."""
    target, *sources = argv
    runs = [json.loads(Path(name).read_text(encoding="utf-8")) for name in sources]
    common.check_writable(target)
    text = json.dumps(merge(runs), indent=2)
    Path(target).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
