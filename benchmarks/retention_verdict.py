"""What the numbers of a retention run mean: targets, ratios, and where it is worse.

Works on the JSON that ``retention.py`` writes, so it can be run again:

    python benchmarks/retention_verdict.py benchmarks/results/retention.json
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from skv_compile.commands.screen import Screen

Record = dict[str, Any]

OURS = "rdr"
KL = {0.75: 0.010, 1.125: 0.005, 1.625: 0.003, 2.125: 0.002}  # nats, policies part
OF_UNIFORM, OF_SNAPKV = 1 / 6, 1 / 4  # of their KL, at the rates above
NEEDLES_AT, NEEDLES_FOUND, NEEDLES_LEAST = 1.125, 0.9, 10
LONG_KL = {1.125: 0.007, 2.125: 0.003}
LONG_OF_UNIFORM = {1.125: 1 / 15, 2.125: 1 / 8}
GROWTH = 2.0  # of the KL of a quarter over the first
RECODED = 0.02  # of coded tokens, at a refresh


def judge(result: Record) -> Record:
    """Every target with its value, or that it was not measured; and ratios to all other lines."""
    checks: list[Record] = []
    policies, long = (result.get(part, {}).get("lines", []) for part in ("policies", "long"))
    if "policies" in result:
        checks += _policies(policies)
    for own in result.get("passkey", {}).get("lengths", []):
        checks += _passkey(own)
    if "long" in result:
        checks += _long(long)
    return {
        "targets": checks,
        "ratios": {"policies": _ratios(policies), "long": _ratios(long)},
    }


def check(
    part: str, what: str, value: float | None, wanted: float, least: bool = False, where: str = ""
) -> Record:
    """A target. ``value`` None: not measured, which is not met."""
    met = value is not None and (value >= wanted if least else value <= wanted)
    sign = ">=" if least else "<="
    row = {"part": part, "what": what, "value": value, "wanted": wanted, "sign": sign, "met": met}
    return row | ({"where": where} if where else {})


def find(lines: list[Record], retention: str, bits: float) -> Record | None:
    """The measured line of a policy at a rate."""
    for line in lines:
        same = line["retention"] == retention and abs(line["bits"] - bits) < 1e-6
        if same and line.get("summary"):
            return line
    return None


def ratio(ours: Record, theirs: Record) -> Record | None:
    """KL of one line over that of another, on the documents that both have."""
    mine = {row["name"]: row["kl_mean"] for row in ours["documents"]}
    others = {row["name"]: row["kl_mean"] for row in theirs["documents"]}
    both = [name for name in mine if others.get(name, 0) > 0]
    if not both:
        return None
    each = {name: mine[name] / others[name] for name in both}
    means = [statistics.fmean(side[name] for name in both) for side in (mine, others)]
    worst = max(each, key=lambda name: each[name])
    return {
        "name": ours["name"],
        "to": theirs["name"],
        "ratio": means[0] / means[1],
        "documents": len(both),
        "worst_document": worst,
        "worst_document_ratio": each[worst],
        "worse_documents": [name for name, value in each.items() if value > 1],
    }


def _ratios(lines: list[Record]) -> list[Record]:
    """Our policy against every other one at equal bits."""
    found = []
    for line in lines:
        ours = find(lines, OURS, line["bits"])
        if ours is not None and line["retention"] != OURS and line.get("summary"):
            found.append(ratio(ours, line))
    return [row for row in found if row is not None]


def _ratio_check(part: str, lines: list[Record], bits: float, other: str, wanted: float) -> Record:
    ours, theirs = find(lines, OURS, bits), find(lines, other, bits)
    found = ratio(ours, theirs) if ours and theirs else None
    what = f"{OURS} {bits:g}: KL over that of {other}"
    if found is None:
        return check(part, what, None, wanted)
    where = f"worst {found['worst_document']}, {found['worst_document_ratio']:.3f}"
    return check(part, what, found["ratio"], wanted, where=where)


def _policies(lines: list[Record]) -> list[Record]:
    checks = []
    for bits, wanted in KL.items():
        ours = find(lines, OURS, bits)
        what = f"{OURS} {bits:g}: mean KL"
        checks.append(check("policies", what, ours and ours["summary"]["kl_mean"], wanted))
    for bits in KL:
        if bits >= 1:
            checks.append(_ratio_check("policies", lines, bits, "none", OF_UNIFORM))
            checks.append(_ratio_check("policies", lines, bits, "snapkv", OF_SNAPKV))
    return checks


def _passkey(own: Record) -> list[Record]:
    length = own["length"]
    exact = sum(row["right"] for row in own["exact"])
    what = f"{length} tokens: needles that the exact model finds"
    checks = [check("passkey", what, exact, NEEDLES_LEAST, least=True)]
    found = [x for x in own["lines"] if x["retention"] == OURS and x["bits"] == NEEDLES_AT]
    share = found[0]["answered"] / found[0]["of"] if found and found[0].get("of") else None
    what = f"{length} tokens, {OURS} {NEEDLES_AT:g}: share of those found"
    return [*checks, check("passkey", what, share, NEEDLES_FOUND, least=True)]


def _long(lines: list[Record]) -> list[Record]:
    checks = []
    for bits, wanted in LONG_KL.items():
        ours = find(lines, OURS, bits)
        summary = ours["summary"] if ours else {}
        title = f"{OURS} {bits:g}"
        checks.append(check("long", f"{title}: mean KL", summary.get("kl_mean"), wanted))
        checks.append(_ratio_check("long", lines, bits, "none", LONG_OF_UNIFORM[bits]))
        growth, where = None, ""
        if ours:
            growth = _growth(summary["quarters"])
            rows = {row["name"]: _growth(row["quarters"]) for row in ours["documents"]}
            worst = max(rows, key=lambda name: rows[name])
            where = f"worst {worst}, {rows[worst]:.2f}"
        what = f"{title}: highest quarter over the first"
        checks.append(check("long", what, growth, GROWTH, where=where))
        what = f"{title}: share re-coded at a refresh"
        checks.append(check("long", what, summary.get("recoded"), RECODED))
    return checks


def _growth(quarters: list[float]) -> float:
    return max(quarters) / quarters[0] if quarters[0] > 0 else 1.0


# ---------------------------------------------------------------- words


def show(result: Record, screen: Screen) -> None:
    """Print every part's lines, the ratios and the targets."""
    if result.get("policies"):
        _show_policies(result["policies"]["lines"], screen)
    for own in result.get("passkey", {}).get("lengths", []):
        _show_passkey(own, screen)
    if result.get("long"):
        _show_long(result["long"]["lines"], screen)
    verdict = result["verdict"]
    for part, rows in verdict["ratios"].items():
        for row in rows:
            words = f"{part}, {row['name']}: {row['ratio']:.3f} of the KL of {row['to']}"
            words += f"; worst document {row['worst_document']}, {row['worst_document_ratio']:.3f}"
            if row["worse_documents"]:
                words += f"; WORSE on {', '.join(row['worse_documents'])}"
            screen.write(words)
    for row in verdict["targets"]:
        state = "NOT MEASURED" if row["value"] is None else "met" if row["met"] else "MISSED"
        value = "" if row["value"] is None else f" {row['value']:.4g}"
        where = f" ({row['where']})" if "where" in row else ""
        screen.write(
            f"target {row['part']}, {row['what']}{value}{where}, wanted {row['sign']} "
            f"{row['wanted']:.4g}: {state}"
        )
    for note in result["notes"]:
        screen.write(f"note: {note}")


def _table(title: str, *columns: str) -> Table:
    view = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    view.add_column("line", no_wrap=True)
    for column in columns:
        view.add_column(column, justify="right", no_wrap=True)
    return view


def _show_policies(lines: list[Record], screen: Screen) -> None:
    columns = ("mean KL ± s.e.", "Δ ppl", "top-1", "bits, prompt / end", "lost", "dropped")
    view = _table("Policies at equal bits", *columns, "prefill")
    for line in lines:
        if not line.get("summary"):
            continue
        mean = line["summary"]
        kept = "fragmentation" in mean
        view.add_row(
            line["name"],
            f"{mean['kl_mean']:.5f} ± {mean['kl_stderr']:.5f}",
            f"{mean['delta_ppl']:+.2f} %",
            f"{100 * mean['same_top1']:.1f} %",
            f"{mean['bits_after_prompt']:.4f} / {mean['bits_after']:.4f}",
            f"{100 * mean['fragmentation']:.1f} %" if kept else "",
            f"{100 * mean['dropped']:.0f} %" if kept else "",
            f"{mean['prefill_ratio']:.2f} x" if "prefill_ratio" in mean else "",
        )
    screen.print(view)


def _show_passkey(own: Record, screen: Screen) -> None:
    exact = sum(row["right"] for row in own["exact"])
    title = f"Pass keys in {own['length']} tokens: the exact model finds {exact}"
    view = _table(f"{title} of {len(own['exact'])}", "answered", "most bits")
    for line in own["lines"]:
        if line["needles"]:
            bits = max(row["bits_per_coordinate"] for row in line["needles"])
            view.add_row(line["name"], f"{line['answered']} / {line['of']}", f"{bits:.4f}")
    screen.print(view)


def _show_long(lines: list[Record], screen: Screen) -> None:
    columns = ("mean KL", "by quarter", "max", "top-1", "re-coded", "bits, prompt - end")
    view = _table("Long generation", *columns)
    for line in lines:
        if not line.get("summary"):
            continue
        mean = line["summary"]
        recoded = "" if mean["recoded"] is None else f"{100 * mean['recoded']:.2f} %"
        view.add_row(
            line["name"],
            f"{mean['kl_mean']:.5f}",
            " ".join(f"{x:.4f}" for x in mean["quarters"]),
            f"{mean['kl_max']:.2f}",
            f"{100 * mean['same_top1']:.1f} %",
            recoded,
            f"{min(mean['bits']):.4f} - {max(mean['bits']):.4f}",
        )
    screen.print(view)


if __name__ == "__main__":
    loaded = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    show(loaded | {"verdict": judge(loaded)}, Screen())
