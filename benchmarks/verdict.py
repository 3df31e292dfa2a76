"""What the numbers of a fidelity run mean: ratios to the baseline, targets, and where it is worse.

Works on the records that ``fidelity.py`` writes, so it can be run again on a JSON file:

    python benchmarks/verdict.py benchmarks/results/fidelity.json
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from skv_compile.commands.screen import Screen

BASELINE = "Hadamard + Lloyd-Max"
OURS = ("frame", "frame, other text", "rings", "grid")
BEYOND = 0.5  # bits above the baseline's highest rate to which its line is drawn out
RATIO = 0.4  # most KL relative to the baseline of the same run

#: (keys only, bits, target, stretch): mean KL in nats.
TARGETS = (
    (False, 2.125, 0.018, 0.012),
    (False, 3.125, 0.0045, 0.003),
    (False, 4.125, 0.0013, 0.0008),
    (True, 2.125, 0.008, 0.0057),
    (True, 1.625, 0.014, 0.010),
)

Record = dict[str, Any]


def find(records: list[Record], codec: str, bits: float, keys_only: bool) -> Record | None:
    """The finished line with this codec, rate and side."""
    for record in records:
        same = record["codec"] == codec and record["keys_only"] == keys_only
        if same and abs(record["bits"] - bits) < 1e-6 and "summary" in record:
            return record
    return None


def judge(records: list[Record]) -> dict[str, Any]:
    """Ratios at equal bits, targets met or not, and every document and layer that is worse."""
    ratios = []
    for record in records:
        base = find(records, BASELINE, record["bits"], record["keys_only"])
        if "summary" in record and record["codec"] in OURS and base is not None:
            ratios.append(_ratio(record, base) | _with_frames(record, records))
    targets = []
    for keys_only, bits, target, stretch in TARGETS:
        ours = find(records, "frame", bits, keys_only)
        if ours is not None:
            kl = ours["summary"]["kl_mean"]
            targets.append(
                {
                    "name": ours["name"],
                    "kl_mean": kl,
                    "target": target,
                    "met": kl <= target,
                    "stretch": stretch,
                    "stretch_met": kl <= stretch,
                }
            )
    return {"baseline": BASELINE, "most": RATIO, "ratios": ratios, "targets": targets}


def _ratio(record: Record, base: Record) -> dict[str, Any]:
    """A line against the baseline's line, document by document and layer by layer."""
    pairs = list(zip(record["documents"], base["documents"], strict=True))
    each = {ours["name"]: ours["kl_mean"] / theirs["kl_mean"] for ours, theirs in pairs}
    ratio = record["summary"]["kl_mean"] / base["summary"]["kl_mean"]
    layers = {
        (ours["name"], layer): value
        for ours, theirs in pairs
        for layer, value in enumerate(_layer_ratios(ours, theirs))
    }
    worst = max(layers, key=lambda key: layers[key]) if layers else None
    return {
        "name": record["name"],
        "ratio": ratio,
        "met": ratio <= RATIO,
        "worst_document": max(each, key=lambda name: each[name]),
        "worst_document_ratio": max(each.values()),
        "worse_documents": [name for name, value in each.items() if value > 1],
        "worst_layer": worst,
        "worst_layer_ratio": layers[worst] if worst else None,
        "worse_layers": [key for key, value in layers.items() if value > 1],
        "layers_measured": len(layers),
    }


def _with_frames(record: Record, records: list[Record]) -> dict[str, Any]:
    """The ratio when a prompt's frames are charged to its own tokens.

    The baseline at that rate is a straight line in log KL between its measured rates.
    """
    lines = [x for x in records if x["codec"] == BASELINE and "summary" in x]
    same = [x for x in lines if x["keys_only"] == record["keys_only"]]
    points = sorted((x["bits"], math.log(x["summary"]["kl_mean"])) for x in same)
    bits = record["bits_with_frames"]
    if len(points) < 2 or bits > points[-1][0] + BEYOND:
        return {"bits_with_frames": bits, "ratio_with_frames": None, "extrapolated": True}
    after = min(max(1, sum(x < bits for x, _ in points)), len(points) - 1)
    (x0, y0), (x1, y1) = points[after - 1], points[after]
    base = math.exp(y0 + (y1 - y0) * (bits - x0) / (x1 - x0))
    return {
        "bits_with_frames": bits,
        "ratio_with_frames": record["summary"]["kl_mean"] / base,
        "extrapolated": not x0 <= bits <= x1,
    }


def _layer_ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> list[float]:
    """Output error of each layer relative to the baseline's; empty where it was not measured."""
    pairs = zip(ours.get("layer_errors", []), theirs.get("layer_errors", []), strict=True)
    return [a / max(b, 1e-30) for a, b in pairs]


def show(result: dict[str, Any], screen: Screen) -> None:
    """Print the lines, the ratios and the targets."""
    view = Table(box=box.SIMPLE_HEAD)
    view.add_column("line")
    for title in (
        "bits",
        "+ frames",
        "mean KL ± s.e.",
        "min-max",
        "Δ ppl",
        "top-1",
        "resident/dense MB",
    ):
        view.add_column(title, justify="right", no_wrap=True)
    for record in result["lines"]:
        if "summary" not in record:
            continue
        mean, cost = record["summary"], record["cost"]
        resident = "simulated"
        if "resident_bytes" in cost:
            resident = f"{cost['resident_bytes'] / 1e6:.1f} / {cost['dense_bytes'] / 1e6:.1f}"
        view.add_row(
            record["name"],
            f"{record['bits']:.3f}",
            f"{record['bits_with_frames']:.3f}",
            f"{mean['kl_mean']:.5f} ± {mean['kl_stderr']:.5f}",
            f"{mean['kl_min']:.5f}-{mean['kl_max']:.5f}",
            f"{mean['delta_ppl']:+.2f} %",
            f"{100 * mean['same_top1']:.1f} %",
            resident,
        )
    screen.print(view)
    found = result["verdict"]
    for row in found["ratios"]:
        words = f"{row['name']}: {row['ratio']:.3f} of {BASELINE} at equal bits"
        words += f" ({'within' if row['met'] else 'ABOVE'} {RATIO})"
        words += f"; worst document {row['worst_document']}, {row['worst_document_ratio']:.3f}"
        if row["worst_layer"] is not None:
            words += f"; worst layer {row['worst_layer'][1]} of {row['worst_layer'][0]}, "
            words += f"{row['worst_layer_ratio']:.3f}"
        screen.write(words)
        if row["ratio_with_frames"] is None:
            screen.write(
                f"  frames counted, {row['bits_with_frames']:.3f} bits: the prompt is too short "
                "for a comparison with the baseline's measured rates"
            )
        else:
            where = "beyond" if row["extrapolated"] else "between"
            screen.write(
                f"  frames counted, {row['bits_with_frames']:.3f} bits: "
                f"{row['ratio_with_frames']:.3f} of the baseline {where} its measured rates"
            )
        if row["worse_documents"]:
            screen.write(f"  WORSE than the baseline on: {', '.join(row['worse_documents'])}")
        if row["worse_layers"]:
            numbers = sorted({layer for _, layer in row["worse_layers"]})
            screen.write(
                f"  WORSE than the baseline in {len(row['worse_layers'])} of "
                f"{row['layers_measured']} (document, layer) pairs; layers {numbers}"
            )
    for row in found["targets"]:
        state = "stretch met" if row["stretch_met"] else "met" if row["met"] else "MISSED"
        screen.write(
            f"target {row['name']}: KL {row['kl_mean']:.5f}, wanted {row['target']}, "
            f"stretch {row['stretch']}: {state}"
        )
    for note in result["notes"]:
        screen.write(f"note: {note}")


if __name__ == "__main__":
    loaded = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    show(loaded | {"verdict": judge(loaded["lines"])}, Screen())
