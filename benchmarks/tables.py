"""Fill the tables and numbers of README.md and docs/ from the JSON in results/.

    python benchmarks/tables.py [--check]

``<!-- NAME -->`` to ``<!-- end -->`` is a table of ``TABLES``, ``<!-- fact NAME -->`` to
``<!-- / -->`` a number of ``facts.FACTS``.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from facts import FACTS, RESULTS
from facts import result as _result

from skv_compile.config import PRESETS

ROOT = Path(__file__).resolve().parent.parent
SHOWN = ("identity", "frame", "rings", "grid", "Hadamard + Lloyd-Max", "KIVI, groups of 32")
README = ROOT / "README.md"


def fidelity() -> str:
    """Codec, bits, KL and what it costs, one line a tier."""
    result = _result("fidelity")
    rows = [
        "| cache | bits | frames counted | KL, nats (worst document) | perplexity | same top-1 |",
        "|---|---|---|---|---|---|",
    ]
    for line in result["lines"]:
        if line["codec"] not in SHOWN or line["keys_only"]:
            continue
        if line["bits"] == 5.125:  # there only to anchor a ratio
            continue
        each = [document["kl_mean"] for document in line["documents"]]
        ppl, top1 = (
            sum(document[key] for document in line["documents"]) / len(each)
            for key in ("delta_ppl", "same_top1")
        )
        name = f"**{line['codec']}**" if line["codec"] == "frame" else line["codec"]
        rows.append(
            f"| {name} | {line['bits']:.3f} | {line['bits_with_frames']:.2f} | "
            f"{sum(each) / len(each):.5f} ({max(each):.5f}) | {ppl:+.2f} % | {100 * top1:.1f} % |"
        )
    return "\n".join(rows)


def retention() -> str:
    """Mean KL (worst document) of every policy at equal bits."""
    result = _result("retention")
    lines = [line for line in result["policies"]["lines"] if line.get("summary")]
    most = max(len(line["documents"]) for line in lines)
    rates = sorted({line["bits"] for line in lines})
    names = list(dict.fromkeys(line["retention"] for line in lines))
    names.sort(key=lambda name: name != "rdr")
    rows = ["| policy | " + " | ".join(f"{bits:g} bits" for bits in rates) + " |"]
    rows.append("|---|" + "---|" * len(rates))
    for name in names:
        cells = []
        for bits in rates:
            found = [x for x in lines if (x["retention"], x["bits"]) == (name, bits)]
            text = "-"
            if found:
                mean = found[0]["summary"]
                text = f"{mean['kl_mean']:.4f} ({mean['kl_max']:.4f})"
                if len(found[0]["documents"]) < most:
                    text += f" [{len(found[0]['documents'])}]"
            cells.append(text)
        label = {"rdr": "**rdr**", "none": "none (uniform)"}.get(name, name)
        rows.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def long() -> str:
    """Mean KL of a long generation, by quarter."""
    result = _result("retention")
    rows = ["| long generation | bits | KL | by quarter | re-coded at a refresh |"]
    rows.append("|---|---|---|---|---|")
    for line in result["long"]["lines"]:
        mean = line.get("summary")
        if mean:
            quarters = " / ".join(f"{x:.4f}" for x in mean["quarters"])
            moved = mean.get("recoded")
            share = "-" if moved is None else f"{100 * moved:.1f} %"
            rows.append(
                f"| {line['retention']} | {line['bits']:g} | {mean['kl_mean']:.4f} | {quarters} | "
                f"{share} |"
            )
    return "\n".join(rows)


def passkey() -> str:
    """Needles found, of those that the exact model finds."""
    result = _result("passkey")["passkey"]
    lengths = result["lengths"]
    rows = ["| needles found | " + " | ".join(f"{x['length']:,} tokens" for x in lengths) + " |"]
    rows.append("|---|" + "---|" * len(lengths))
    names = list(dict.fromkeys(line["name"] for x in lengths for line in x["lines"]))
    for name in names:
        cells = []
        for own in lengths:
            found = [x for x in own["lines"] if x["name"] == name and "of" in x]
            cells.append(f"{found[0]['answered']} of {found[0]['of']}" if found else "-")
        rows.append(f"| {name} bits | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _ms(ms: float) -> str:
    return f"{ms:.3g}" if ms < 1000 else f"{ms:.0f}"


def _speed(part: str, head: str, file: str = "bench") -> str:
    """Milliseconds of one part of ``skv bench``, and how many times faster than its first line."""
    lines = _result(file)[part]
    shapes = list(dict.fromkeys((x["tokens"], x["batch"]) for x in lines))
    names = list(dict.fromkeys(x["name"] for x in lines))
    rows = [f"| {head} | " + " | ".join(f"{n // 1024}k x {b}" for n, b in shapes) + " |"]
    rows.append("|---|" + "---|" * len(shapes))
    for name in names:
        cells = []
        for shape in shapes:
            found = [x for x in lines if (x["name"], x["tokens"], x["batch"]) == (name, *shape)]
            text = "-"
            if found:
                ms = found[0]["ms"]
                text = _ms(ms)
                if name != names[0]:
                    text += f" ({found[0]['faster']:.2f}x)"
                if "mean_ms" in found[0] and name != names[0]:
                    text += f", {found[0]['mean_ms']:.3g}"
            cells.append(text)
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def attend() -> str:
    """One attention on a GPU."""
    return _speed("attend", "attention, ms")


def step() -> str:
    """A whole step on a GPU."""
    return _speed("step", "step, ms")


def prompts() -> str:
    """A prompt on a GPU."""
    return _speed("prefill", "prompt, ms", "bench_prefill")


def cpu() -> str:
    """One attention, a step and a prompt on a CPU."""
    result = _result("bench_cpu")
    attended = result["attend"]
    shapes = list(dict.fromkeys((x["head_dim"], x["tokens"]) for x in attended))
    columns = [f"attention, D={d}, {n // 1024}k" for d, n in shapes]
    others = {
        f"{part}, {result[part][0]['tokens'] // 1024}k": {x["name"]: x for x in result[part]}
        for part in ("step", "prefill")
    }
    head = ["CPU, ms", *columns, *others]
    rows = [f"| {' | '.join(head)} |", "|---|" + "---|" * (len(head) - 1)]
    names = dict.fromkeys(x["name"] for part in ("attend", "step") for x in result[part])
    for name in names:
        found = [
            next(
                (x for x in attended if (x["name"], x["head_dim"], x["tokens"]) == (name, *s)), None
            )
            for s in shapes
        ]
        found += [lines.get(name) for lines in others.values()]
        cells = [f"{_ms(x['ms'])} ({x['faster']:.2f}x)" if x else "-" for x in found]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def demo() -> str:
    """The demo's two sides."""
    result = _result("demo")
    dense, small = result["dense"], result["spherical"]
    rows = ["| `make demo`, CPU | dense | compressed |", "|---|---|---|"]
    rows.append(
        f"| bytes of the cache | {dense['resident_bytes']:,} | {small['resident_bytes']:,} |"
    )
    rows.append(
        f"| decoding, tokens a second | {dense['speed']['tokens_per_second']:.1f} | "
        f"{small['speed']['tokens_per_second']:.1f} |"
    )
    return "\n".join(rows)


def runs() -> str:
    """What made every JSON of results/."""
    rows = ["| results/ | device | torch | command |", "|---|---|---|---|"]
    for file in sorted(RESULTS.glob("*.json")):
        found = _result(file.stem)
        commands = found["command"]
        commands = [commands] if isinstance(commands, str) else commands
        shown = "<br>".join(f"`{x}`" for x in commands[:2])
        if len(commands) > 2:
            shown += f"<br>and {len(commands) - 2} more like it"
        torch = dict.fromkeys(found.get("versions", {}).get("torch", "-").split("; "))
        device = found.get("device", "-")
        rows.append(f"| {file.name} | {device} | {', '.join(torch)} | {shown} |")
    return "\n".join(rows)


def _at(line: dict[str, Any]) -> tuple[int, int]:
    return line["tokens"], line["batch"]


def presets() -> str:
    """Each preset: how close, how small, how fast."""
    kept = {
        x["bits"]: x for x in _result("retention")["policies"]["lines"] if x["retention"] == "rdr"
    }
    gpu = {x["name"]: x for x in _result("bench_presets")["step"] if _at(x) == (32768, 1)}
    cpu = {x["name"]: x for x in _result("bench_cpu")["step"]}
    head = "preset, bits, KL (worst), same top-1, bytes against dense, step on H200, step on CPU"
    rows = [f"| {' | '.join(head.split(', '))} |", "|---|" + "---|" * 6]
    for name, settings in PRESETS.items():
        if "bits" not in settings:
            continue
        bits = settings["bits"]
        close, fast, slow = kept[bits], gpu[f"rdr {bits}"], cpu[f"rdr {bits}, fp32"]
        top1 = statistics.fmean(x["same_top1"] for x in close["documents"])
        smaller = gpu["HF static"]["cache_bytes"] / fast["allocated_bytes"]
        cells = [
            f"`{name}`",
            f"{bits:g}",
            f"{close['summary']['kl_mean']:.4f} ({close['summary']['kl_max']:.4f})",
            f"{100 * top1:.1f} %",
            f"1 / {smaller:.1f}",
            *(f"{_ms(x['ms'])} ms ({x['faster']:.1f}x)" for x in (fast, slow)),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def tensor_parallel() -> str:
    """A step of a model that is split over GPUs, and the bytes of a rank's cache."""
    runs = _result("tensor_parallel")["runs"]
    names = list(dict.fromkeys(x["name"] for run in runs for x in run["lines"]))
    rows = [f"| GPUs, tokens | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for run in runs:
        for tokens in dict.fromkeys(x["tokens"] for x in run["lines"]):
            lines = {x["name"]: x for x in run["lines"] if x["tokens"] == tokens}
            first = lines[names[0]]["ms"]
            cells = [
                f"{_ms(x['ms'])} ({first / x['ms']:.2f}x), {x['bytes'] / 1e6:.0f} MB"
                for x in (lines[name] for name in names)
            ]
            rows.append(f"| {run['processes']}, {tokens // 1024}k | " + " | ".join(cells) + " |")
    return "\n".join(rows)


#: Those of the README, which has each once; and those of the docs alone.
TABLES: dict[str, Callable[[], str]] = {"presets": presets, "step": step}
MORE: dict[str, Callable[[], str]] = {
    "fidelity": fidelity,
    "retention": retention,
    "long": long,
    "passkey": passkey,
    "demo": demo,
    "attend": attend,
    "prompts": prompts,
    "cpu": cpu,
    "tensor-parallel": tensor_parallel,
    "runs": runs,
}


def filled(page: str, text: str) -> str:
    """A page with every marked table and number made anew.

    Raises:
        SystemExit: a mark without its end or at the beginning of a line, a number that ``FACTS``
            does not have, or a README without one of its tables.
    """
    for name, make in {**TABLES, **MORE}.items():
        begin = f"<!-- {name} -->\n"
        wanted = 1 if page == README.name and name in TABLES else text.count(begin)
        pattern = rf"({begin})(?:(?!<!-- {name} -->).)*?(<!-- end -->)"
        table = make() if wanted else ""
        text, found = re.subn(pattern, lambda m, t=table: m[1] + t + "\n" + m[2], text, flags=re.S)
        if found != wanted:
            raise SystemExit(f"{page} has {found} places for the table {name!r}, expected {wanted}")

    if re.search(r"^<!-- fact ", text, re.M):
        raise SystemExit(
            f"{page} has a number that begins a line: Markdown ends the paragraph there"
        )

    def number(mark: re.Match[str]) -> str:
        if mark[1] not in FACTS:
            raise SystemExit(
                f"{page} asks for the number {mark[1]!r}, which facts.py does not have"
            )
        return f"<!-- fact {mark[1]} -->{FACTS[mark[1]]()}<!-- / -->"

    text, found = re.subn(r"<!-- fact (\S+) -->[^<\n]*<!-- / -->", number, text)
    if found != text.count("<!-- fact "):
        raise SystemExit(f"{page} has a number without its end, <!-- / -->")
    return text


def main() -> None:
    wrong = []
    for file in (README, *sorted((ROOT / "docs").glob("*.md"))):
        old = file.read_text(encoding="utf-8")
        new = filled(file.name, old)
        if old != new:
            wrong.append(file.name)
            if "--check" not in sys.argv[1:]:
                file.write_text(new, encoding="utf-8")
    if "--check" in sys.argv[1:] and wrong:
        sys.exit(f"{', '.join(wrong)} do not match results/: run benchmarks/tables.py")


if __name__ == "__main__":
    main()
