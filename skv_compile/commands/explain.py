"""``skv explain``: which attention sites of a model are rewritten, and why the others are not.

With ``--html`` also as a page for others, with ``--dump`` the graphs before and after, and with
``--retention-map`` what a cache keeps of a text, as a picture.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from skv_compile.commands import common
from skv_compile.commands.screen import Screen

if TYPE_CHECKING:
    from skv_compile.config import Config

HELP = "show which attention sites of a model are rewritten, and why the others are not"

PREFIX = 2048
TOKENS = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model to look at, the settings of its cache, and the picture to draw."""
    parser.add_argument(
        "model", metavar="MODEL", help="Hugging Face id, local folder, GGUF file, or 'demo'"
    )
    common.add_cache_arguments(parser)
    parser.add_argument(
        "--tokens",
        type=common.positive,
        default=TOKENS,
        metavar="N",
        help=f"slots of the cache whose bytes are counted (default: {TOKENS})",
    )
    parser.add_argument(
        "--html", metavar="FILE", help="also write the report as one self-contained HTML page"
    )
    parser.add_argument(
        "--dump",
        metavar="DIR",
        help="also write the graphs before and after, a report of each, and a script that runs the "
        "pass on it again; numbers continue where DIR has files",
    )
    drawing = parser.add_argument_group("retention map")
    drawing.add_argument(
        "--retention-map",
        metavar="FILE",
        help="run a text through a compressed cache and draw which tokens it keeps, and how well "
        "(.png, .svg or .pdf)",
    )
    drawing.add_argument(
        "--documents",
        metavar="PATH",
        help="a text file, or a folder whose first .txt file is taken; by default a part of "
        "Python's language reference",
    )
    drawing.add_argument(
        "--prefix",
        type=common.positive,
        metavar="N",
        help=f"tokens of the text (default: {PREFIX})",
    )


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Trace one decoding step and print the report; then draw."""
    import skv_compile as skv

    config = skv.Config(**common.overrides(args))
    _check(args)
    import torch

    from skv_compile import models
    from skv_compile.commands import sites

    with screen.step("Model") as update:
        loaded = models.load(args.model, report=update)
    model = loaded.model
    with screen.step("Tracing one decoding step"), torch.no_grad():
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        report = skv.explain(model, token, config=config, dump=args.dump, max_cache_len=args.tokens)
    sites.show(report, screen)
    if args.html:
        common.write_text(args.html, report.to_html(f"skv explain {args.model}"))
        screen.write(f"{args.html}: the report as a page.")
    if args.dump:
        screen.write(f"{args.dump}: the graphs before and after, and scripts that run the pass.")
    result: dict[str, Any] = {
        "model": args.model,
        "device": common.device_name(model.device),
        "report": json.loads(report.to_json()),
    }
    if args.retention_map:
        result["retention_map"] = _draw(args, config, loaded, screen)
    return result


def _check(args: argparse.Namespace) -> None:
    """Refuse now what would fail after the model has loaded."""
    from skv_compile import evaluate
    from skv_compile.dump import check_folder
    from skv_compile.retention import map as drawing

    if args.html:
        common.check_writable(args.html, "--html")
    if args.dump:
        check_folder(args.dump)
    if not args.retention_map:
        for name in ("documents", "prefix"):
            if getattr(args, name) is not None:
                raise common.UsageError(f"--{name} is for --retention-map FILE; add that")
        return
    drawing.check_drawing(args.retention_map)
    evaluate.read_texts([args.documents] if args.documents else [])


def _draw(args: argparse.Namespace, config: Config, loaded: Any, screen: Screen) -> dict[str, Any]:
    """Run the text, draw what is kept of it, and say it in numbers."""
    import dataclasses

    import torch

    import skv_compile as skv
    from skv_compile import evaluate
    from skv_compile.retention import map as drawing

    prefix = args.prefix or PREFIX
    texts = evaluate.read_texts([args.documents] if args.documents else [])
    name, text = next(iter(texts.items()))
    ids = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:prefix]
    if len(ids) < prefix:
        raise common.UsageError(
            f"{name} makes {len(ids)} tokens, and {prefix} are wanted; give a longer text with "
            "--documents, or lower --prefix"
        )
    with common.forwards(screen, f"Retention of {prefix} tokens of {name}", loaded.model):
        cache = skv.SphericalCache(loaded.model.config, prefix, config)
        evaluate.fill(loaded.model, torch.tensor(ids, device=loaded.device), cache)
        cache.raise_flags()
    try:
        found = drawing.retention_map(cache)
    except skv.CacheStateError as error:
        raise common.UsageError(f"--prefix {prefix}: {error}") from error
    bits = cache.bits_per_coordinate
    drawing.draw(
        found,
        args.retention_map,
        f"{args.model}, {name}: retention {config.retention}, {bits:.3f} bits per coordinate",
    )
    short = drawing.compact(found)
    kept = ", ".join(f"{name} {100 * share:.1f} %" for name, share in short["shares"].items())
    screen.write(
        f"\n{args.retention_map}: what retention {config.retention} keeps of {short['tokens']} "
        f"compressed tokens of {name}, at {bits:.3f} bits per coordinate.\n{kept}."
    )
    return {
        "file": args.retention_map,
        "document": name,
        "prefix_tokens": prefix,
        "config": dataclasses.asdict(config),
        "bits_per_coordinate": bits,
        **short,
    }
