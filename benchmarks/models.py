"""What happens to every decoder of the installed transformers: docs/models.md and its JSON.

    python benchmarks/models.py [--only llama mistral ...] [--docs FILE] [--json FILE]

Each is built tiny from its own config with random weights, generates with a dense cache and with
`codec="identity"`, and is compared token by token; the rewritten graphs run without Inductor. With
`--only`, the other rows stay as the JSON has them.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import shlex
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests"
DOCS, RESULTS = HERE.parent / "docs" / "models.md", HERE / "results" / "models.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], metavar="ARCHITECTURE")
    parser.add_argument("--docs", default=str(DOCS), metavar="FILE")
    parser.add_argument("--json", default=str(RESULTS), metavar="FILE")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, str(TESTS))
    import torch
    from zoo import table
    from zoo.tiny import architectures
    from zoo.trial import trial

    from skv_compile.commands import common

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    names = list(architectures())
    if unknown := set(args.only) - set(names):
        parser.error(f"transformers has no decoder {', '.join(sorted(unknown))}")
    old = {}
    if args.only:
        old = table.from_json(json.loads(Path(args.json).read_text(encoding="utf-8")))
    begin, rows = time.perf_counter(), []
    for name in names:
        if name in old and name not in args.only:
            rows.append(old[name])
            continue
        torch._dynamo.reset()
        gc.collect()
        rows.append(trial(name))
        print(f"{rows[-1].seconds:5.1f} s  {table.line(rows[-1])}", flush=True)
    versions = common.versions()
    result = {
        "device": "cpu",
        "seconds": round(time.perf_counter() - begin, 1),
        "counts": dict(Counter(row.result for row in rows)),
        "rows": [asdict(row) for row in rows],
    }
    common.write_json(args.json, shlex.join(["python", *sys.argv]), result)
    Path(args.docs).parent.mkdir(parents=True, exist_ok=True)
    Path(args.docs).write_text(table.document(rows, versions), encoding="utf-8")
    print(result["counts"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
