"""``skv explain``: which attention sites of a model are rewritten, and why the others are not."""

from __future__ import annotations

import argparse
import json
from typing import Any

from skv_compile.commands import common
from skv_compile.commands.screen import Screen

HELP = "show which attention sites of a model are rewritten, and why the others are not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model to look at."""
    parser.add_argument(
        "model", metavar="MODEL", help="Hugging Face id, local folder, GGUF file, or 'demo'"
    )


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Trace one decoding step and print the report."""
    import torch

    import skv_compile as skv
    from skv_compile import models

    with screen.step("Model") as update:
        model = models.load(args.model, report=update).model
    with screen.step("Tracing one decoding step"), torch.no_grad():
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        report = skv.explain(model, token)
    screen.write(str(report))
    return {
        "model": args.model,
        "device": common.device_name(model.device),
        "report": json.loads(report.to_json()),
    }
