"""Bits against KL, one line a codec, drawn from the JSON of ``fidelity.py``.

    python benchmarks/plot_fidelity.py [benchmarks/results/fidelity.json]

Writes fidelity.png and fidelity.svg beside it. Needs matplotlib: pip install 'skv-compile[bench]'
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DEFAULT = Path(__file__).parent / "results" / "fidelity.json"

MOST = 5.1  # bits; rates above are in the table only

#: codec: (label, colour, marker). Colours of Okabe and Ito, told apart by the colour-blind.
STYLES = {
    "frame": ("frame", "#D55E00", "o"),
    "frame, other text": ("frame, calibrated\non other text", "#E69F00", "s"),
    "rings": ("rings", "#009E73", "^"),
    "grid": ("grid", "#0072B2", "D"),
    "Hadamard + Lloyd-Max": ("Hadamard +\nLloyd-Max", "#000000", "v"),
    "KIVI, groups of 32": ("KIVI, 32", "#CC79A7", "P"),
    "KIVI, groups of 64": ("KIVI, 64", "#7A7A7A", "X"),
}


def draw(result: dict[str, Any]) -> Any:
    """The figure; bars are the standard error over documents."""
    figure, axes = plt.subplots(figsize=(8.4, 4.8), dpi=160, layout="constrained")
    labels: list[tuple[float, float, str, str, str]] = []
    for codec, (label, colour, marker) in STYLES.items():
        points = _points(result, codec, "bits")
        if not points:
            continue
        bits, kl, error = zip(*points, strict=True)
        # A bar that reached 0 has no place on a log scale.
        down = [min(e, 0.9 * k) for e, k in zip(error, kl, strict=True)]
        style: dict[str, Any] = {"color": colour, "marker": marker, "lw": 2, "ms": 6, "capsize": 3}
        axes.errorbar(bits, kl, yerr=[down, error], ls="--" if "KIVI" in codec else "-", **style)
        labels.append((bits[0], kl[0], label, colour, "left" if "KIVI" in codec else "right"))
    counted = _points(result, "frame", "bits_with_frames")
    if counted:
        colour = STYLES["frame"][1]
        bits, kl, _ = zip(*counted, strict=True)
        axes.plot(bits, kl, ":", color=colour, marker="o", mfc="white", ms=5, lw=1.5)
        labels.append((bits[0], kl[0], "frame, the frames\nthemselves counted", colour, "left"))
    axes.set_yscale("log")
    left, right = axes.get_xlim()
    axes.set_xlim(left - 0.6, right + 0.9)
    _label(axes, labels)
    axes.set_xlabel("bits per coordinate of the compressed tokens (scales and radii counted)")
    axes.set_ylabel("mean KL to the exact model, nats")
    axes.grid(which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    count, how = len(result["documents"]), result["protocol"]
    axes.set_title(
        f"{count} document{'s' if count > 1 else ''}, {how['tokens']} tokens scored after "
        f"{how['prefix']:,}; lower left is better",
        fontsize=10,
    )
    return figure


def _points(result: dict[str, Any], codec: str, rate: str) -> list[tuple[float, float, float]]:
    """(bits, KL, its standard error) of a codec's lines, coarse to fine."""
    return sorted(
        (x[rate], x["summary"]["kl_mean"], x["summary"]["kl_stderr"])
        for x in result["lines"]
        if x["codec"] == codec and not x["keys_only"] and "summary" in x and x[rate] < MOST
    )


def _label(axes: Any, labels: list[tuple[float, float, str, str, str]]) -> None:
    """Name every line at one of its ends, pushed apart where ends are close."""
    axes.figure.canvas.draw()
    placed: list[tuple[float, float, float, str]] = []
    for x, y, label, colour, side in sorted(labels, key=lambda one: one[1]):
        px, py = axes.transData.transform((x, y))
        half = 14 + 12 * label.count("\n")
        for qx, qy, other, where in placed:
            if side == where and abs(px - qx) < 100 and abs(py - qy) < half + other:
                py = qy + half + other
        placed.append((px, py, half, side))
        _, shown = axes.transData.inverted().transform((px, py))
        axes.annotate(
            label,
            (x, shown),
            xytext=(-9 if side == "right" else 9, 0),
            textcoords="offset points",
            color=colour,
            ha=side,
            va="center",
            fontsize=9,
            fontweight="bold",
        )


def save(argv: list[str], default: Path, draw: Callable[[dict[str, Any]], Any]) -> None:
    """Draw a JSON file, the one that ``argv`` names or the default, beside itself."""
    source = Path(argv[0]) if argv else default
    figure = draw(json.loads(source.read_text(encoding="utf-8")))
    for suffix in (".png", ".svg"):
        figure.savefig(source.with_suffix(suffix))
        print(source.with_suffix(suffix))


def main(argv: list[str]) -> None:
    """Draw this benchmark's JSON file."""
    save(argv, DEFAULT, draw)


if __name__ == "__main__":
    main(sys.argv[1:])
