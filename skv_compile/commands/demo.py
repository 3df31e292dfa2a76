"""``skv demo``: a real model answers about a real document, dense and compressed side by side."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from skv_compile.commands import common
from skv_compile.commands.screen import Screen

if TYPE_CHECKING:
    from skv_compile.demo import Result, Side

HELP = "the main job on a real model: dense and compressed cache side by side"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, cache settings, length of the answer."""
    parser.add_argument(
        "--max-new-tokens",
        type=common.positive,
        default=48,
        metavar="N",
        help="of both answers (48)",
    )
    common.add_model_arguments(parser)


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Measure, then print the two texts and the table."""
    chosen = common.overrides(args)
    from skv_compile import demo

    result = demo.run(args.model, screen, max_new_tokens=args.max_new_tokens, overrides=chosen)
    show(result, screen)
    return result.to_dict()


def show(result: Result, screen: Screen) -> None:
    """Print what was measured."""
    dense, spherical, far = result.dense, result.spherical, result.fidelity
    screen.write(f"\nA document and a question about it, {result.prompt_tokens} tokens together:")
    screen.write(f"  {result.question}")
    for title, side in (("Dense cache", dense), ("Spherical cache", spherical)):
        screen.write(f"\n{title}:\n  {side.text.strip()}")
    screen.write("")

    from rich import box
    from rich.table import Table

    view = Table("", box=box.SIMPLE_HEAD)
    for title in ("dense", "spherical"):
        view.add_column(title, justify="right")
    ratio = dense.resident_bytes / spherical.resident_bytes
    view.add_row(
        "resident bytes of the cache",
        f"{dense.resident_bytes:,}",
        f"{spherical.resident_bytes:,} ({ratio:.2f}x smaller)",
    )
    view.add_row(
        "bits per coordinate",
        f"{dense.bits_per_coordinate:g}",
        f"{spherical.bits_per_coordinate:.3f}",
    )
    view.add_row("decoding, tokens per second", _rate(dense), _rate(spherical))
    kl = f"{far.kl_mean:.5f} ± {far.kl_stderr:.5f}"
    view.add_row("mean KL to the exact model, nats", "0", kl)
    view.add_row("same top-1 as the exact model", "100 %", f"{100 * far.same_top1:.1f} %")
    view.add_row("perplexity", "", f"{far.delta_ppl:+.2f} %")
    screen.print(view)
    screen.write(
        f"{result.model} in {result.dtype} on {result.device}; both sides decode compiled.\n"
        f"- The texts share their first {result.common_tokens} of {result.shorter} tokens.\n"
        f"- Bits count the compressed region; resident bytes also hold the exact sinks and the "
        f"exact recent window.\n"
        f"- KL, top-1 and perplexity: {far.tokens} tokens of the document scored through the "
        f"cache, after {result.prefix_tokens}.\n"
        f"- Speed: the median step, without the first {common.WARM_UP_STEPS}, which contain "
        f"compilation\n  ({_first(dense)} s dense, {_first(spherical)} s spherical)."
    )
    cores = os.cpu_count() or 1
    if result.load_before is not None and result.load_before > 0.75 * cores:
        screen.write(
            f"- Other programs were using this machine (load {result.load_before:.1f} on {cores} "
            "cores before the start): do not trust the speeds."
        )


def _rate(side: Side) -> str:
    rate = side.speed["tokens_per_second"]
    return f"{rate:.1f}" if rate else "too few tokens"


def _first(side: Side) -> str:
    return f"{side.speed['first_steps_seconds']:.0f}"
