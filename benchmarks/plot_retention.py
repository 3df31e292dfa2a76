"""Retention policies: bits against KL, and KL over a long generation, from ``retention.py``'s JSON.

    python benchmarks/plot_retention.py [benchmarks/results/retention.json]

Writes retention.png and retention.svg beside it. Needs matplotlib: pip install 'skv-compile[bench]'
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from plot_fidelity import save

DEFAULT = Path(__file__).parent / "results" / "retention.json"

#: policy: (colour, marker). Colours of Okabe and Ito, told apart by the colour-blind.
STYLES = {
    "rdr": ("#D55E00", "o"),
    "none": ("#000000", "v"),
    "snapkv": ("#0072B2", "s"),
    "h2o": ("#009E73", "^"),
    "prefix": ("#56B4E9", "D"),
    "window": ("#CC79A7", "P"),
    "retrieval": ("#E69F00", "X"),
    "streaming": ("#7A7A7A", "*"),
}
OTHER = ("#999999", "h")
LABELS = {"rdr": "rdr (ours)", "none": "none: every token alike"}
GAP = 13  # points between two labels


def draw(result: dict[str, Any]) -> Any:
    """The figure; bars are the standard error over documents."""
    panels = [part for part in ("policies", "long") if result.get(part, {}).get("lines")]
    if not panels:
        raise SystemExit("the JSON holds neither the part 'policies' nor 'long': nothing to draw")
    width = 7.0 * len(panels)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(width, 4.8), dpi=160, layout="constrained", squeeze=False
    )
    for part, one in zip(panels, axes[0], strict=True):
        {"policies": _policies, "long": _long}[part](one, result)
        one.set_yscale("log")
        one.set_ylabel("mean KL to the exact model, nats")
        one.grid(which="major", alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    figure.canvas.draw()
    for one in axes[0]:
        _label(one)
    return figure


def _policies(axes: Any, result: dict[str, Any]) -> None:
    """Bits against KL, a line a policy."""
    lines = [x for x in result["policies"]["lines"] if x.get("summary")]
    for policy in dict.fromkeys(x["retention"] for x in lines):
        colour, marker = STYLES.get(policy, OTHER)
        points = sorted(
            (x["bits"], x["summary"]["kl_mean"], x["summary"]["kl_stderr"])
            for x in lines
            if x["retention"] == policy
        )
        bits, kl, error = zip(*points, strict=True)
        # A bar that reached 0 has no place on a log scale.
        down = [min(e, 0.9 * k) for e, k in zip(error, kl, strict=True)]
        axes.errorbar(
            bits,
            kl,
            yerr=[down, error],
            color=colour,
            marker=marker,
            lw=2.5 if policy == "rdr" else 1.5,
            ms=6,
            capsize=3,
            label=LABELS.get(policy, policy),
        )
    left, right = axes.get_xlim()
    axes.set_xlim(left, right + 0.4 * (right - left))
    axes.set_xlabel("bits per coordinate, everything stored, dropped tokens counted")
    most, how = max(x["summary"]["documents"] for x in lines), result["protocol"]
    axes.set_title(
        f"{most} document{'s' if most > 1 else ''}, {how['tokens']} tokens scored after "
        f"{how['prefix']:,}; lower left is better",
        fontsize=10,
    )


def _long(axes: Any, result: dict[str, Any]) -> None:
    """KL by position, a line a policy and rate; the coarser rate is dashed."""
    lines = [x for x in result["long"]["lines"] if x.get("summary")]
    rates = sorted({x["bits"] for x in lines})
    how = result["protocol"]
    for line in lines:
        colour, _ = STYLES.get(line["retention"], OTHER)
        columns = zip(*(row["blocks"] for row in line["documents"]), strict=True)
        kl = [sum(block["kl_mean"] for block in same) / len(same) for same in columns]
        size = how["long_tokens"] / len(kl)
        at = [how["long_prompt"] + (n + 0.5) * size for n in range(len(kl))]
        axes.plot(
            at,
            _smooth(kl),
            color=colour,
            ls="--" if len(rates) > 1 and line["bits"] == rates[0] else "-",
            lw=2.5 if line["retention"] == "rdr" else 1.5,
            label=f"{line['retention']}, {line['bits']:g} bits",
        )
    left, right = axes.get_xlim()
    axes.set_xlim(left, right + 0.4 * (right - left))
    axes.set_xlabel("position in the sequence")
    axes.set_title(
        f"{how['long_tokens']:,} tokens, teacher-forced, after a prompt of {how['long_prompt']:,}",
        fontsize=10,
    )


def _smooth(values: list[float], reach: int = 1) -> list[float]:
    """Means over a value and its neighbours."""
    parts = [values[max(0, n - reach) : n + reach + 1] for n in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def _label(axes: Any) -> None:
    """Name every line at its right end, pushed apart where ends are close."""
    handles, names = axes.get_legend_handles_labels()
    ends = []
    for handle, name in zip(handles, names, strict=True):
        line = handle[0] if hasattr(handle, "lines") else handle
        x, y = line.get_xdata()[-1], line.get_ydata()[-1]
        ends.append((*axes.transData.transform((x, y))[::-1], name, line.get_color()))
    step = GAP * axes.figure.dpi / 72
    top: dict[int, float] = {}  # of the labels so far, by where on the x axis they begin
    for at, x, name, colour in sorted(ends):
        place = round(x)
        top[place] = max(at, top.get(place, float("-inf")) + step)
        axes.annotate(
            name,
            axes.transData.inverted().transform((x, top[place])),
            xytext=(9, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=9,
            fontweight="bold",
        )


def main(argv: list[str]) -> None:
    """Draw this benchmark's JSON file."""
    save(argv, DEFAULT, draw)


if __name__ == "__main__":
    main(sys.argv[1:])
