"""``skv bench``: one attention, and whole steps, against dense caches in the same run."""

from __future__ import annotations

import argparse
from typing import Any

from skv_compile.commands import common
from skv_compile.commands.screen import Screen

HELP = "time attention and whole decoding steps against dense caches (needs a CUDA device)"
PARTS = ("attend", "step")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured."""
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: both")
    parser.add_argument("--most", type=common.positive, metavar="N", help="longest context")


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Measure everything, print tables, and return all lines."""
    import torch
    from rich import box
    from rich.table import Table

    from skv_compile.bench import attend, step, timing

    if not torch.cuda.is_available():
        raise common.UsageError(
            "skv bench needs a CUDA device: torch.cuda.is_available() is False here."
        )
    with screen.step("Copy bandwidth"):
        bandwidth = timing.copy_bandwidth()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "copy_bytes_per_second": bandwidth,
    }
    shapes = {"attend": attend.SHAPES, "step": step.SHAPES}
    names = {
        "attend": (*attend.DENSE, *attend.OURS),
        "step": (step.DENSE, *step.OURS),
    }
    for part in args.parts:
        llama = step.model() if part == "step" else None
        lines: list[dict[str, Any]] = []
        view = Table("", "tokens x batch", "ms", "times dense", "of floor", box=box.SIMPLE_HEAD)
        for tokens, batch in shapes[part]:
            if args.most and tokens > args.most:
                continue
            dense = None
            for name in names[part]:
                with screen.step(f"{part}: {name}, {tokens} x {batch}"):
                    if llama is None:
                        one = attend.line(name, tokens, batch, bandwidth)
                    else:
                        one = step.line(name, llama, tokens, batch, bandwidth)
                torch.cuda.empty_cache()
                dense = dense or one["ms"]
                one["faster"] = dense / one["ms"]
                lines.append(one)
                row = f"{one['ms']:.4g}", f"{one['faster']:.2f}", f"{one['of_floor']:.0%}"
                view.add_row(name, f"{tokens} x {batch}", *row)
        found[part] = lines
        screen.print(view)
    return found
