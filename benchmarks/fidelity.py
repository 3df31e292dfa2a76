"""Fidelity of every codec and of published baselines, in one run and one protocol.

    python benchmarks/fidelity.py [--documents FOLDER] [--json FILE]

Exact prefill, then a continuation scored through the cache (``skv_compile.evaluate``). The
product's codecs run through ``skv.SphericalCache``; baselines replace the same tokens of the
exact cache by what their decoder would read.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import baselines
import setting
import torch
import verdict
from lines import Line, baseline_lines, product_lines

from skv_compile import evaluate
from skv_compile.codec import tiers
from skv_compile.codec.tiers import LARGE_PAGE_TOKENS
from skv_compile.commands import common
from skv_compile.commands.screen import Screen

PROTOCOL = ("prefix", "tokens", "sinks", "recent", "frame")
RESULTS = Path(__file__).parent / "results" / "fidelity.json"


def measure(
    model: Any,
    lines: list[Line],
    texts: list[evaluate.Document],
    args: argparse.Namespace,
    report: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Every line on every document, as plain records. A line that fails is recorded as failed."""
    records: list[dict[str, Any]] = [
        {
            "name": line.name,
            "codec": line.codec,
            "bits": line.bits,
            "keys_only": line.keys_only,
            "simulated": line.simulated,
            "note": line.note,
            "documents": [],
        }
        for line in lines
    ]
    parts: list[list[Any]] = [[] for _ in lines]
    page = LARGE_PAGE_TOKENS
    pace = evaluate.Pace(len(lines) * len(texts))
    for document in texts:
        exact = evaluate.run_exact(model, document, args.prefix)
        for line, record, done in zip(lines, records, parts, strict=True):
            report(f"{pace.next()}: {line.name} on {document.name}")
            if "error" in record:
                continue
            start = time.perf_counter()
            try:
                with torch.no_grad():
                    outcome = line.run(exact)
                    done.append(exact.compare(outcome.logits))
                    layers = evaluate.layer_errors(exact, outcome.past()) if args.layers else []
            except Exception as error:  # the other lines of a long run are worth keeping
                record["error"] = f"{type(error).__name__}: {error}"
                continue
            seconds = {"seconds": time.perf_counter() - start}
            row = {"name": document.name, **done[-1].to_dict(), **seconds}
            record["documents"].append(row | ({"layer_errors": layers} if layers else {}))
            record["cost"] = outcome.cost
            coded = baselines.coded_region(args.prefix, args.sinks, args.recent, page)
            keys = sum(k[:, :, coded].numel() for k, _ in exact.past)
            frames = 8 * outcome.cost["frame_bytes"] / max(1, keys * (2 - line.keys_only))
            record["bits_with_frames"] = line.bits + frames
    for record, done in zip(records, parts, strict=True):
        if done and "error" not in record:
            record["summary"] = evaluate.summarise(done)
    return records


def parse(argv: list[str]) -> argparse.Namespace:
    """Arguments of the script."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--model", default="demo", help="as for skv (default: demo)")
    add("--documents", metavar="FOLDER", help=".txt files, calib-*.txt left out; else downloaded")
    add("--limit", type=common.positive, metavar="N", help="only the first N documents")
    add("--frame", metavar="FILE", help="frames made by skv calibrate from other documents")
    add("--prefix", type=common.positive, default=evaluate.PREFIX, help="tokens in the cache")
    add("--tokens", type=common.positive, default=evaluate.TOKENS, help="tokens scored after them")
    add("--sinks", type=int, default=4)
    add("--recent", type=int, default=64)
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "float64"))
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--threads", type=common.positive, help="CPU threads")
    add("--only", metavar="WORD", nargs="+", help="only lines whose name contains one of the words")
    add("--block", type=common.positive, metavar="N", help="tokens that share a rotary turn")
    add("--layers", action="store_true", help="also the output error of every layer")
    add("--json", default=str(RESULTS), metavar="FILE")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Measure, write the JSON, print the tables; 1 when a line failed."""
    args = parse(argv)
    if args.block:
        tiers.BLOCK_TOKENS = args.block
    screen = Screen()
    texts, loaded = setting.prepare(args, screen)
    model = loaded.model

    def encode(part: str) -> list[int]:
        return loaded.tokenizer(part, add_special_tokens=False)["input_ids"]

    length = args.prefix + args.tokens + 1
    ready = evaluate.tokenize(texts, encode, length, model.device)
    notes: list[str] = []
    lines = [*product_lines(model, args, notes), *baseline_lines(model, args)]
    lines = [x for x in lines if not args.only or any(word in x.name for word in args.only)]
    with screen.step(f"{len(lines)} lines on {len(ready)} documents") as update:
        records = measure(model, lines, ready, args, update)
    result = {
        **setting.about(args, texts, model.device, PROTOCOL),
        "notes": notes + [f"{r['name']} failed: {r['error']}" for r in records if "error" in r],
        "lines": records,
        "verdict": verdict.judge(records),
    }
    common.write_json(args.json, shlex.join(["python", "benchmarks/fidelity.py", *argv]), result)
    verdict.show(result, screen)
    screen.note(f"written to {args.json}")
    return int(any("error" in record for record in records))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
