"""Retention policies: at equal stored bytes, on needles, and over a long generation.

    python benchmarks/retention.py [--documents FOLDER] [--parts policies passkey long]

Every part runs through ``skv.SphericalCache`` against the same model with an exact cache. The JSON
is written after everything that was measured; ``--resume`` goes on from there.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import long_generation
import passkey
import retention_lines
import retention_verdict
import setting
from retention_lines import Record, select

from skv_compile import evaluate, models
from skv_compile.codec.tiers import STRIDE
from skv_compile.commands import common
from skv_compile.commands.screen import Screen
from skv_compile.config import CODECS
from skv_compile.errors import SkvError

RESULTS = Path(__file__).parent / "results" / "retention.json"
PARTS = ("policies", "passkey", "long")
LENGTHS = (2048, 4096)

#: What must be the same when a run goes on from another's JSON.
PROTOCOL = ("codec", "prefix", "tokens", "sinks", "recent", "needles", "long_prompt")
PROTOCOL += ("long_tokens", "step")

NOTES = (
    "What a policy knows of a token is a score byte beside its code in the page, and counts in "
    "bits per coordinate, as do gaps, radii, page headers and lists of pages. Frames, sinks, "
    "recent window, kept queries and the constants of a head do not depend on the length; they are "
    "in resident_bytes.",
    "Dropped tokens are among the coordinates that bits are divided by.",
    f"long: forwards of {STRIDE} tokens, from where a stride has just left the exact window, are "
    "the same computation as single steps: they fit the ring, wait there, and are moved and judged "
    "before the next one. --step 1 shows it.",
    "long: recoded and dropped are the shares of coded tokens that a refresh moved to another "
    "tier, and out of the cache, counted by comparing the pages before and after. 'counters' are "
    "the cache's own since the prompt.",
    "passkey: the question follows in a forward of its own, after the prompt was compressed.",
)


def parse(argv: list[str]) -> argparse.Namespace:
    """Arguments of the script."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add, positive = parser.add_argument, common.positive
    add("--model", default="demo", help="as for skv (default: demo)")
    add("--documents", metavar="FOLDER", help=".txt files, calib-*.txt left out; else downloaded")
    add("--limit", type=positive, metavar="N", help="only the first N documents")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    add("--only", nargs="+", metavar="PART/WORD", help="only lines whose name has one of these")
    add("--bits", type=float, nargs="+", metavar="B", help="only these rates")
    add("--codec", default="frame", choices=[x for x in CODECS if x != "identity"])
    add("--sinks", type=int, default=4)
    add("--recent", type=int, default=64)
    add("--prefix", type=positive, default=evaluate.PREFIX, help="policies: tokens in the cache")
    add("--tokens", type=positive, default=evaluate.TOKENS, help="policies: tokens scored after")
    add("--lengths", type=positive, nargs="+", default=LENGTHS, help="passkey: tokens of a prompt")
    add("--needles", type=positive, default=20, metavar="N", help="passkey: tried at every length")
    add("--long-prompt", type=positive, default=1024, help="long: rounded up to a whole stride")
    add("--long-tokens", type=positive, default=2048, help="long: tokens after it")
    add("--step", type=positive, default=STRIDE, help="long: tokens of a forward")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "float64"))
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--threads", type=positive, help="CPU threads")
    add("--json", default=str(RESULTS), metavar="FILE")
    add("--no-timing", dest="timing", action="store_false", help="policies: no reference prefill")
    add("--resume", action="store_true", help="keep what FILE has and measure only the rest")
    args = parser.parse_args(argv)
    quarter = long_generation.BLOCK * long_generation.QUARTERS
    if "long" in args.parts and args.long_tokens % quarter:
        parser.error(f"--long-tokens must be a multiple of {quarter}")
    if STRIDE % args.step:
        parser.error(f"--step must divide {STRIDE}")
    args.long_prompt = long_generation.aligned(args.long_prompt, args.sinks, args.recent)
    return args


def resumed(old: Record, new: Record) -> Record:
    """``new`` with the parts that ``old`` has measured.

    Raises:
        UsageError: they were measured otherwise, or on other documents of the same name.
    """
    for name in ("model", "dtype", "protocol"):
        if old[name] != new[name]:
            raise common.UsageError(
                f"--resume: the JSON was measured with {name} {old[name]}, not {new[name]}; "
                "give another --json, or the same arguments"
            )
    hashes = {x["name"]: x["sha256"] for x in new["documents"]}
    for x in old["documents"]:
        if hashes.get(x["name"], x["sha256"]) != x["sha256"]:
            raise common.UsageError(f"--resume: the document {x['name']} has changed")
    more = [x for x in old["documents"] if x["name"] not in hashes]
    kept = {part: old[part] for part in PARTS if part in old}
    devices = dict.fromkeys([*old["device"].split("; "), new["device"]])
    whole = {"documents": new["documents"] + more, "device": "; ".join(devices)}
    return new | kept | whole


def commands(record: Record) -> list[str]:
    """Those that made a record: several, where one went on with what another had left."""
    found = record["command"]
    return [found] if isinstance(found, str) else found


def main(argv: list[str]) -> int:
    """Measure, write the JSON, print the tables; 1 when a line failed."""
    args = parse(argv)
    own = shlex.join(["python", "benchmarks/retention.py", *argv])
    screen = Screen()
    texts, loaded = setting.prepare(args, screen)
    result = setting.about(args, texts, loaded.device, PROTOCOL) | {"notes": list(NOTES)}
    if args.resume and Path(args.json).exists():
        old = json.loads(Path(args.json).read_text(encoding="utf-8"))
        result = resumed(old, result) | {"command": [*commands(old), own]}

    def save() -> None:
        result["verdict"] = retention_verdict.judge(result)
        common.write_json(args.json, own, result)

    with tempfile.TemporaryDirectory() as folder:
        args.retention_table = _table(loaded.model, args, Path(folder), result["notes"])
        for part in args.parts:
            with screen.step(part) as update:
                _measure(part, loaded, texts, args, result, update, save)
    result["notes"] += [f"{where} failed: {error}" for where, error in errors(result)]
    save()
    retention_verdict.show(result, screen)
    screen.note(f"written to {args.json}")
    return int(bool(errors(result)))


def _table(model: Any, args: argparse.Namespace, folder: Path, notes: list[str]) -> str | None:
    """A file with the scores of the model's heads, if a line needs them; None: there is none."""
    args.retention_table = ""
    lines = select("policies", retention_lines.policy_settings(), args, [])
    tabled = any(line.retention == retention_lines.TABLED for line in lines)
    if "policies" not in args.parts or not tabled:
        return None
    try:
        from skv_compile.retention.table import measure_heads, save_table

        file = str(folder / "heads.json")
        save_table(file, measure_heads(model))
    except (ImportError, SkvError) as error:
        notes.append(f"{retention_lines.TABLED} left out: no table of heads: {error}")
        return None
    return file


def _measure(
    part: str,
    loaded: models.Loaded,
    texts: dict[str, str],
    args: argparse.Namespace,
    result: Record,
    update: retention_lines.Report,
    save: Any,
) -> None:
    """One part of the measurement, into ``result``."""

    def encode(words: str) -> list[int]:
        return loaded.tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]

    def ready(length: int) -> list[evaluate.Document]:
        return evaluate.tokenize(texts, encode, length + 1, loaded.device)

    own, notes = result.setdefault(part, {}), result["notes"]
    model = loaded.model
    if part == "policies":
        lines = select(part, retention_lines.policy_settings(), args, notes)
        ids = ready(args.prefix + args.tokens)
        retention_lines.measure(model, lines, ids, args, own, update, save)
    elif part == "passkey":
        lines = select(part, passkey.SETTINGS, args, notes)
        passkey.measure(model, loaded.tokenizer, lines, texts, args, own, update, save)
    else:
        lines = select(part, long_generation.SETTINGS, args, notes)
        ids = ready(args.long_prompt + args.long_tokens)
        long_generation.measure(model, lines, ids, args, own, update, save)


def errors(result: Record) -> list[tuple[str, str]]:
    """(part/line, error) of every line that failed."""
    found = []
    for part in PARTS:
        own = result.get(part, {})
        groups = [own, *own.get("lengths", [])]
        lines: list[Record] = [line for group in groups for line in group.get("lines", [])]
        found += [(f"{part}/{x['name']}", x["error"]) for x in lines if "error" in x]
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
