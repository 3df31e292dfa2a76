"""What every fidelity script begins with: documents, a model, and the head of its JSON."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import documents
import torch

from skv_compile import evaluate, models
from skv_compile.commands import common
from skv_compile.commands.screen import Screen


def prepare(args: argparse.Namespace, screen: Screen) -> tuple[dict[str, str], models.Loaded]:
    """Texts by name, calibration ones left out, and the model; the JSON can be written."""
    Path(args.json).absolute().parent.mkdir(parents=True, exist_ok=True)
    common.check_writable(args.json)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("highest")
    with screen.step("Documents") as update:
        folder = Path(args.documents) if args.documents else documents.fetch(report=update)
    texts = evaluate.read_texts([str(folder)])
    texts = dict([(n, t) for n, t in texts.items() if not n.startswith("calib")][: args.limit])
    with screen.step("Model") as update:
        dtype = getattr(torch, args.dtype)
        loaded = models.load(args.model, device=args.device, dtype=dtype, report=update)
    return texts, loaded


def about(
    args: argparse.Namespace, texts: dict[str, str], device: torch.device, protocol: Sequence[str]
) -> dict[str, Any]:
    """The head of a JSON: on what, and how, everything is measured."""
    return {
        "device": common.device_name(device),
        "model": args.model,
        "dtype": args.dtype,
        "protocol": {name: getattr(args, name) for name in protocol},
        "source": documents.SOURCE if not args.documents else "given with --documents",
        "documents": [
            {"name": name, "sha256": hashlib.sha256(content.encode()).hexdigest()}
            for name, content in texts.items()
        ],
    }
