"""The kernels on small cases under compute-sanitizer, and what it found, as JSON.

    python benchmarks/sanitizer.py [--json FILE]

Needs a CUDA device and compute-sanitizer of the CUDA toolkit on the PATH.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "sanitizer.json"
TOOLS = ("memcheck", "racecheck")
CASES = "test_kernels_equal_the_reference and (frame or hidden) and not size"


def run(tool: str) -> subprocess.Popen[str]:
    """Start the small cases of tests/gpu under a tool."""
    test = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:xdist", "-k", CASES]
    command = ["compute-sanitizer", "--tool", tool]
    for kernel in ("prepare", "pages", "merge"):
        command += ["--kernel-name", f"kns={kernel}"]
    command += [*test, "tests/gpu/test_kernels_cuda.py"]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default=str(RESULTS), metavar="FILE")
    args = parser.parse_args()
    from skv_compile.commands import common

    started = {tool: run(tool) for tool in TOOLS}
    found: dict[str, object] = {"device": torch.cuda.get_device_name(), "cases": CASES}
    clean = True
    for tool, process in started.items():
        text, _ = process.communicate()
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
        tests = re.findall(r"\d+ passed", text)
        found[tool] = {"summary": summary, "tests": tests, "exit": process.returncode}
        none = any(re.search(r": 0 (errors|hazards)", line) for line in summary)
        clean &= process.returncode == 0 and none and bool(tests)
        print(tool, *(summary or [text[-2000:]]), *tests)
    common.write_json(args.json, shlex.join(["python", *sys.argv]), found)
    return 0 if clean else 1


if __name__ == "__main__":
    raise SystemExit(main())
