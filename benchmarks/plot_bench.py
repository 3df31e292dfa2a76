"""Milliseconds and bytes against context length, from the JSON of ``skv bench``.

python benchmarks/plot_bench.py [bench.json]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import plot_fidelity

RESULTS = Path(__file__).resolve().parent / "results" / "bench.json"


def draw(record: dict[str, Any]) -> Any:
    """Three panels: times of one attention and of a step, and bytes of the cache."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    panels = (
        ("attend", "ms", "one attention, ms"),
        ("step", "ms", "one step of 8 layers, ms"),
        ("attend", "bytes", "bytes read by one attention"),
    )
    for ax, (part, value, title) in zip(axes, panels, strict=True):
        lines = [x for x in record.get(part, []) if x["batch"] == 1]
        for name in dict.fromkeys(x["name"] for x in lines):
            own = [x for x in lines if x["name"] == name]
            dense = not name.startswith(("uniform", "rdr"))
            ax.plot(
                [x["tokens"] for x in own],
                [x[value] for x in own],
                linestyle="--" if dense else "-",
                marker="o",
                label=name,
            )
        ax.set(xscale="log", yscale="log", xlabel="tokens in the cache, batch 1", title=title)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    figure.suptitle(record["device"], fontsize=9)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    plot_fidelity.save(sys.argv[1:], RESULTS, draw)
