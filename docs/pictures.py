"""Draw docs/pictures/*.svg from the objects that run: layouts, frames, turns and graphs.

    python docs/pictures.py [NAME ...]

Needs matplotlib (pip install 'skv-compile[bench]'); ``digits`` also runs the demo model.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "examples")]

import matplotlib  # noqa: E402

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "skv"  # the same file from the same objects

import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

import skv_compile as skv  # noqa: E402
from skv_compile.codec.tiers import choose_layout, tiers  # noqa: E402

PICTURES = HERE / "pictures"

#: Colours of Okabe and Ito, told apart by the colour-blind.
COLOURS = {
    "key_digits": "#0072B2",
    "value_digits": "#009E73",
    "key_radius": "#56B4E9",
    "value_radius": "#A5D8B8",
    "gap": "#E69F00",
    "score": "#CC79A7",
}
HEAD_DIM, TOKENS = 64, 4096


def page() -> Figure:
    """The bytes of one page, in every tier of the default settings."""
    layout = choose_layout(skv.Config(), HEAD_DIM, TOKENS, "bfloat16", turned=True)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.add_subplot()
    rows = tiers(layout)
    for n, tier in enumerate(rows):
        for name, field in layout.fields[n].items():
            look = {"color": COLOURS[name], "edgecolor": "white", "linewidth": 0.8}
            axes.barh(n, field.size, left=field.offset, label=name if n == 0 else None, **look)
            if field.size > 60:
                middle = field.offset + field.size / 2
                axes.text(middle, n, str(field.size), ha="center", va="center", color="white")
        end = max(field.offset + field.size for field in layout.fields[n].values())
        text = f"{layout.capacity[n]} tokens, {tier.rate:.2f} bits"
        axes.text(end + 12, n, text, va="center", fontsize=9)
    axes.axvline(layout.page_bytes, color="black", lw=0.8, ls=":")
    axes.set_yticks(range(len(rows)), [tier.name for tier in rows])
    axes.set_xlim(0, 1.25 * layout.page_bytes)
    axes.set_xlabel(
        f"bytes of a page ({layout.page_bytes}; head dim {HEAD_DIM}, cache of {TOKENS:,} tokens)"
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=6, frameon=False, fontsize=9)
    return figure


def digits() -> Figure:
    """Digits that the coordinates of a frame fitted to a prompt get, tier by tier."""
    from skv_compile.models import load
    from skv_compile.text import document

    loaded = load("demo")
    skv.compile(loaded.model)
    ids = loaded.tokenizer(document(), return_tensors="pt", verbose=False)["input_ids"][:, :1024]
    cache = skv.SphericalCache(loaded.model.config, max_cache_len=1024)
    with torch.no_grad():
        loaded.model(ids, past_key_values=cache, logits_to_keep=1)
    cache.raise_flags()
    number, head = len(cache.states) // 2, 0
    state = cache.states[number]
    layout = state.layout
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    both = figure.subplots(2, 1, sharex=True)
    for axes, side in zip(both, ("key", "value"), strict=True):
        table = torch.zeros(len(layout.tiers), layout.head_dim)
        for t in range(len(layout.tiers)):
            frame = state.tensors.frames(layout, t)[side == "value"]
            table[t] = frame.plan[head, 0].long().bincount(minlength=layout.head_dim)
        order = table.sum(0).argsort(descending=True, stable=True)
        image = axes.imshow(table[:, order], aspect="auto", cmap="viridis", vmin=0, vmax=4)
        axes.set_yticks(range(len(layout.tiers)), [tier.name for tier in tiers(layout)])
        axes.set_ylabel(f"{side}s")
    both[1].set_xlabel("coordinate of the frame, most digits first")
    figure.colorbar(image, ax=both, ticks=range(5), label="2-bit digits")
    figure.suptitle(f"SmolLM2-135M-Instruct, layer {number}, kv head {head}", fontsize=10)
    return figure


def turning() -> Figure:
    """What is left of the rotary turn of a constant key, turned back by its block."""
    from transformers import LlamaConfig

    from skv_compile.codec.rotary import rotary_plan
    from skv_compile.lowering.turn import block_start, turn

    layout = choose_layout(skv.Config(), HEAD_DIM, TOKENS, "bfloat16", turned=True)
    model = LlamaConfig(head_dim=HEAD_DIM, rope_parameters={"rope_theta": 1e5})
    plan = rotary_plan(model, HEAD_DIM)
    assert plan is not None
    i = torch.arange(1024)
    t = i + layout.sinks
    rotated = turn(torch.ones(len(t), HEAD_DIM), t, plan)
    back = turn(rotated, -block_start(i, layout), plan)
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    for axes, pair in zip(figure.subplots(1, 3, sharey=True), (8, 14, 20), strict=True):
        period = 2 * torch.pi / plan[0, pair]
        axes.plot(t, rotated[:, pair], color="#999999", lw=1, label="as the model rotates it")
        axes.plot(t, back[:, pair], color="#D55E00", lw=1.5, label="turned back by its block")
        axes.set_title(f"coordinate {pair}: a turn in {period:,.0f} tokens", fontsize=9)
        axes.set_xticks(range(0, len(t) + 1, 2 * layout.block))
        axes.set_xlabel("token")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def graph() -> Figure:
    """The calls of examples/own_module.py's graph, before the pass and after."""
    from own_module import Attention

    from skv_compile.backend import SkvBackend

    found: list[list[str]] = []

    class Listening(SkvBackend):
        """Keeps the names of the calls, and compiles nothing."""

        def __call__(self, gm: Any, example_inputs: Any) -> Any:
            found.append(_calls(gm))
            return super().__call__(gm, example_inputs)

        def _compile(self, gm: Any, example_inputs: Any, config: Any) -> Any:
            found.append(_calls(gm))
            return gm

    torch._dynamo.reset()
    with torch.no_grad():
        module = torch.compile(Attention(), backend=Listening(config=skv.Config(bits=4.2)))
        module(torch.randn(1, 16, 256), torch.arange(16))
    before, after = found
    rows = max(map(len, found))
    figure = Figure(figsize=(9, 0.27 * rows + 0.6), layout="constrained")
    for n, (title, names) in enumerate((("before", before), ("after", after))):
        axes = figure.add_subplot(1, 2, n + 1)
        for row, name in enumerate(names):
            ours = name.startswith("skv::")
            gone = n == 0 and name not in after
            colour = "#D55E00" if ours else "#0072B2" if gone else "#555555"
            look = {"family": "monospace", "fontsize": 9, "color": colour}
            axes.text(0.02, row, name, va="center", weight="bold" if ours else None, **look)
        axes.set_ylim(rows - 0.5, -0.8)
        axes.set_title(title, fontsize=10, loc="left")
        axes.axis("off")
    return figure


def _calls(gm: Any) -> list[str]:
    names = []
    for node in gm.graph.nodes:
        if not node.op.startswith("call_"):
            continue
        target = node.target
        name = target if isinstance(target, str) else str(getattr(target, "__name__", target))
        if "skv" in str(target):
            name = "skv::" + str(target).removeprefix("skv.").split(".")[0]
        names.append(name)
    return names


DRAW: dict[str, Callable[[], Figure]] = {
    "page": page,
    "digits": digits,
    "turning": turning,
    "graph": graph,
}


def drawn(name: str) -> bytes:
    """A picture as SVG."""
    file = io.BytesIO()
    DRAW[name]().savefig(file, format="svg", metadata={"Date": None}, facecolor="white")
    return b"\n".join(line.rstrip() for line in file.getvalue().splitlines()) + b"\n"


def main() -> None:
    names = sys.argv[1:] or list(DRAW)
    if unknown := set(names) - set(DRAW):
        sys.exit(f"no picture {', '.join(sorted(unknown))}; there are {', '.join(DRAW)}")
    PICTURES.mkdir(exist_ok=True)
    for name in names:
        (PICTURES / f"{name}.svg").write_bytes(drawn(name))
        print(f"docs/pictures/{name}.svg")


if __name__ == "__main__":
    main()
