"""Single numbers for the sentences of the docs, from the JSON in results/.

In a page, ``<!-- fact NAME -->...<!-- / -->`` is filled by ``tables.py``.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def result(name: str) -> Any:
    """A JSON of results/."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _line(lines: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The one line whose fields are these."""
    found = [x for x in lines if all(x[name] == value for name, value in wanted.items())]
    if len(found) != 1:
        raise SystemExit(f"{len(found)} lines with {wanted}, expected one")
    return found[0]


def _slower(file: str, name: str) -> str:
    """How many times as long a prompt takes, from the least to the most."""
    times = [1 / x["faster"] for x in result(file)["prefill"] if x["name"] == name]
    low, high = f"{min(times):.1f}", f"{max(times):.1f}"
    return f"{low} times" if low == high else f"{low} to {high} times"


def _attend(name: str, tokens: int, file: str = "bench") -> str:
    """How many times faster one attention is than SDPA."""
    line = _line(result(file)["attend"], name=name, tokens=tokens, batch=1)
    return f"{line['faster']:.2f}"


def _microseconds(name: str) -> str:
    line = _line(result("bench")["attend"], name=name, tokens=2048, batch=1)
    return f"{1000 * line['ms']:.0f} us"


def _compiled(where: str, name: str) -> dict[str, Any]:
    found = result("compile_time")
    return _line(found["lines"] if where == "cpu" else found["cuda"]["lines"], name=name)


def _compile(where: str, name: str) -> str:
    return f"{_compiled(where, name)['ratio']:.2f}"


def _compile_seconds(where: str) -> str:
    return f"{_compiled(where, 'HF static')['seconds']:.0f} s"


def _blocks(rate: str) -> str:
    """What a turn for every 512 tokens costs over one for every 128."""
    means = result("blocks")["kl_mean"][f"frame {rate}"]
    many, few = (statistics.fmean(means[size].values()) for size in ("512", "128"))
    return f"{100 * (many / few - 1):.0f} %"


def _kl(codec: str, bits: float) -> str:
    line = _line(result("fidelity")["lines"], codec=codec, bits=bits, keys_only=False)
    return f"{line['summary']['kl_mean']:.4f}"


def _policy(name: str, bits: float) -> str:
    line = _line(result("retention")["policies"]["lines"], retention=name, bits=bits)
    return f"{line['summary']['kl_mean']:.4f}"


def _frames() -> str:
    """Bytes of the frames of the measured model, with one tier."""
    line = _line(result("fidelity")["lines"], codec="frame", bits=2.125, keys_only=False)
    return f"{line['cost']['frame_bytes'] / 1e6:.1f} MB"


def _models(name: str) -> str:
    return str(result("models")["counts"].get(name, 0))


def _demo() -> str:
    found = result("demo")
    share = found["spherical"]["resident_bytes"] / found["dense"]["resident_bytes"]
    return f"{1 / share:.1f}"


def _cost(name: str) -> str:
    return f"{100 * result('retention_cost')['seconds'][name]:.0f} %"


FACTS: dict[str, Callable[[], str]] = {
    "architectures": lambda: str(sum(result("models")["counts"].values())),
    "rewritten": lambda: _models("rewritten"),
    "refused": lambda: _models("refused"),
    "prompt-gpu-none": lambda: _slower("bench_prefill", "uniform 2.0625"),
    "prompt-gpu-rdr": lambda: _slower("bench_prefill", "rdr 1.125"),
    "prompt-cpu-none": lambda: _slower("bench_cpu", "uniform 2.125, fp32"),
    "prompt-cpu-rdr": lambda: _slower("bench_cpu", "rdr 1.125, fp32"),
    "attend-2k": lambda: _attend("uniform 2.0625", 2048),
    "attend-8k": lambda: _attend("uniform 2.0625", 8192),
    "attend-32k": lambda: _attend("uniform 2.0625", 32768),
    "attend-128k": lambda: _attend("uniform 2.0625", 131072),
    "attend-128k-4": lambda: _attend("uniform 4.0625", 131072),
    "attend-128k-fp8": lambda: _attend("flashinfer fp8", 131072),
    "ours-2k-us": lambda: _microseconds("uniform 2.0625"),
    "sdpa-2k-us": lambda: _microseconds("sdpa enable_gqa"),
    "compile-cpu": lambda: _compile_seconds("cpu"),
    "compile-cpu-none": lambda: _compile("cpu", "none 2.125"),
    "compile-cpu-rdr": lambda: _compile("cpu", "rdr 1.125"),
    "compile-gpu": lambda: _compile_seconds("cuda"),
    "compile-gpu-none": lambda: _compile("cuda", "none 2.125"),
    "blocks-1": lambda: _blocks("1.125"),
    "blocks-2": lambda: _blocks("2.125"),
    "blocks-4": lambda: _blocks("4.125"),
    "kl-frame-2": lambda: _kl("frame", 2.125),
    "kl-frame-other": lambda: _kl("frame, other text", 2.125),
    "kl-grid-2": lambda: _kl("grid", 2.125),
    "kl-lloyd-2": lambda: _kl("Hadamard + Lloyd-Max", 2.125),
    "kl-kivi-3": lambda: _kl("KIVI, groups of 32", 3.0),
    "kl-rdr-1": lambda: _policy("rdr", 1.125),
    "kl-rdr-2": lambda: _policy("rdr", 2.125),
    "kl-snapkv-1": lambda: _policy("snapkv", 1.125),
    "frames": _frames,
    "demo-ratio": _demo,
    "demo-tokens": lambda: f"{result('demo')['cache']['seen_tokens']:,}",
    "judging": lambda: _cost("utilities_of_prompt"),
    "refresh": lambda: _cost("refresh_of_a_stride"),
    "mutants": lambda: str(len(result("mutants")["mutants"])),
    "mutants-killed": lambda: str(result("mutants")["killed"]),
    "fuzz": lambda: f"{result('fuzz')['total']:,}",
}
