"""``skv bench``: one attention, and whole steps, against dense caches in the same run."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

from skv_compile.commands import common
from skv_compile.commands.screen import Screen

HELP = "time attention, decoding steps and prompts against dense caches"
PARTS = ("attend", "step", "prefill")
PLACES = {"step": "CONTEXT", "prefill": "PROMPT"}  # of the CPU's, how many tokens there are


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured."""
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--most", type=common.positive, metavar="N", help="longest context")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="default: cuda where there is one, else cpu"
    )


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Measure everything, print tables, and return all lines."""
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        return _cpu(args, screen)
    if not torch.cuda.is_available():
        raise common.UsageError(
            "--device cuda: torch.cuda.is_available() is False here. Leave it out, or use "
            "--device cpu."
        )
    return _cuda(args, screen)


def _save(args: argparse.Namespace, found: dict[str, Any]) -> None:
    if args.json:  # a run that is stopped leaves what it has
        common.write_json(args.json, shlex.join(["skv", *sys.argv[1:]]), found)


def _cpu(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    import torch
    from rich import box
    from rich.table import Table

    from skv_compile.bench import cpu
    from skv_compile.evaluate import Pace
    from skv_compile.lowering.cpu import library

    variant = library.variant() if library.load() else None
    found: dict[str, Any] = {
        "device": common.device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "kernels": variant or "reference",
        "load_before": common.load_average(),
    }
    screen.note(f"CPU, {found['threads']} threads, kernels: {found['kernels']}")
    shapes = [shape for shape in cpu.ATTEND if not args.most or shape[-1] <= args.most]
    whole = [part for part in args.parts if part != "attend" and _wanted(args, cpu, part)]
    pace = Pace(len(shapes) * ("attend" in args.parts) + len(whole))
    for part in args.parts:
        found[part] = []
        if part == "attend":
            for shape in shapes:
                title = f"attend: {shape[-1]} tokens, head dim {shape[2]}"
                with screen.step(f"{pace.next()}: {title}"):
                    found[part] += cpu.attend(shape)
        elif part in whole:
            with screen.step(f"{pace.next()}: {part} (step: compiles first)"):
                found[part] = getattr(cpu, part)(cpu.model())
        _save(args, found)
        view = Table("", "tokens", "ms", "mean", "times best dense", box=box.SIMPLE_HEAD)
        for one in found[part]:
            numbers = (f"{one[key]:.4g}" for key in ("ms", "mean_ms"))
            view.add_row(one["name"], str(one["tokens"]), *numbers, f"{one['faster']:.2f}")
        screen.print(view)
    return found


def _wanted(args: argparse.Namespace, place: Any, part: str) -> bool:
    return not args.most or getattr(place, PLACES[part]) <= args.most


def _cuda(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    import torch
    from rich import box
    from rich.table import Table

    from skv_compile.bench import attend, prefill, step, timing
    from skv_compile.evaluate import Pace

    with screen.step("Memory bandwidth"):
        bandwidth = timing.bandwidth()
    measured: dict[str, Any] = {"attend": attend, "step": step, "prefill": prefill}
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "bytes_per_second": bandwidth,
        "not_measured": [why for part in args.parts for why in measured[part].missing()],
    }
    for why in found["not_measured"]:
        screen.note(f"not measured: {why}")
    sizes = {
        part: [s for s in measured[part].SHAPES if not args.most or s[0] <= args.most]
        for part in args.parts
    }
    pace = Pace(sum(len(measured[part].names(*s)) for part in args.parts for s in sizes[part]))
    for part in args.parts:
        llama = () if part == "attend" else (step.model(),)
        lines: list[dict[str, Any]] = []
        found[part] = lines
        columns = ("", "tokens x batch", "ms", "mean", "times dense", "of floor")
        view = Table(*columns, box=box.SIMPLE_HEAD)
        for tokens, batch in sizes[part]:
            dense = None
            for name in measured[part].names(tokens, batch):
                with screen.step(f"{pace.next()}: {part}: {name}, {tokens} x {batch}"):
                    one = measured[part].line(name, *llama, tokens, batch, bandwidth)
                torch.cuda.empty_cache()
                dense = dense or one["ms"]
                one["faster"] = dense / one["ms"]
                lines.append(one)
                _save(args, found)
                mean, floor = one.get("mean_ms"), one.get("of_floor")
                view.add_row(
                    name,
                    f"{tokens} x {batch}",
                    f"{one['ms']:.4g}",
                    f"{mean:.4g}" if mean else "",
                    f"{one['faster']:.2f}",
                    f"{floor:.0%}" if floor else "",
                )
        screen.print(view)
    return found
