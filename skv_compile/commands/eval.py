"""``skv eval``: how far a compressed cache is from the exact model, on real text."""

from __future__ import annotations

import argparse
from typing import Any

from skv_compile.commands import common
from skv_compile.commands.screen import Screen

HELP = "measure a compressed cache against the exact model on documents"

DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, cache settings, documents and lengths."""
    common.add_model_arguments(parser)
    parser.add_argument("--sinks", type=int, metavar="N", help="first tokens that stay exact")
    parser.add_argument("--recent", type=int, metavar="N", help="last tokens that stay exact")
    parser.add_argument(
        "--documents",
        nargs="+",
        default=[],
        metavar="PATH",
        help="text files, or folders of .txt files; by default one built-in document, a part of "
        "Python's language reference",
    )
    parser.add_argument(
        "--prefix",
        type=common.positive,
        default=3072,
        metavar="N",
        help="tokens in the cache (3072)",
    )
    parser.add_argument(
        "--tokens",
        type=common.positive,
        default=512,
        metavar="N",
        help="tokens scored after them (512)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the model (float32); 16 bits add rounding noise to the distance",
    )


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Measure, then print a row a document and their mean."""
    import skv_compile as skv

    chosen = common.overrides(args)
    chosen |= {k: v for k in ("sinks", "recent") if (v := getattr(args, k)) is not None}
    config = skv.Config(**chosen)
    from skv_compile import evaluate

    texts = evaluate.read_texts(args.documents)
    import torch

    from skv_compile import models

    with screen.step("Model") as update:
        loaded = models.load(args.model, dtype=getattr(torch, args.dtype), report=update)

    def encode(part: str) -> list[int]:
        return loaded.tokenizer(part, add_special_tokens=False)["input_ids"]

    length = args.prefix + args.tokens + 1
    documents = evaluate.tokenize(texts, encode, length, loaded.device)
    title, runs = f"Scoring {args.tokens} tokens after {args.prefix}", 4 * len(documents)
    with common.forwards(screen, title, loaded.model, runs):
        result = evaluate.evaluate(loaded.model, documents, args.prefix, config, screen.note)
    show(result, screen)
    device = common.device_name(loaded.device)
    settings = f"codec {config.codec}, retention {config.retention}"
    screen.write(f"{args.model} in {args.dtype} on {device}, {settings}.")
    return {"model": args.model, "device": device, "dtype": args.dtype, **result}


def show(result: dict[str, Any], screen: Screen) -> None:
    """Print what was measured."""
    from rich import box
    from rich.table import Table

    view = Table(box=box.SIMPLE_HEAD)
    view.add_column("document")
    for title in ("mean KL, nats", "same top-1", "perplexity"):
        view.add_column(title, justify="right")
    for row in result["documents"]:
        view.add_row(
            row["name"],
            f"{row['kl_mean']:.5f}",
            f"{100 * row['same_top1']:.1f} %",
            f"{row['delta_ppl']:+.2f} %",
        )
    mean, cost = result["summary"], result["cost"]
    if mean["documents"] > 1:
        view.add_section()
        view.add_row(
            f"mean of {mean['documents']} documents",
            f"{mean['kl_mean']:.5f} ± {mean['kl_stderr']:.5f}",
            f"{100 * mean['same_top1']:.1f} %",
            f"{mean['delta_ppl']:+.2f} %",
        )
    screen.print(view)
    screen.write(
        f"{cost['bits_per_coordinate']:.3f} bits per coordinate; "
        f"{common.size(cost['resident_bytes'])} resident instead of "
        f"{common.size(cost['dense_bytes'])}, of which frames {common.size(cost['frame_bytes'])}."
    )
    if "tokens_by_tier" in cost:
        dropped, kept = cost["tokens_dropped"], sum(cost["tokens_by_tier"])
        screen.write(
            f"{100 * dropped / max(1, dropped + kept):.1f} % of the tokens that left the exact "
            "window are dropped; bits count them."
        )
