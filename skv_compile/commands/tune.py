"""``skv tune``: how the attention kernels are launched best on this GPU."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from skv_compile.commands import common
from skv_compile.commands.screen import Screen

HELP = (
    "measure how the attention kernels for a model's cache are launched best on this GPU, and "
    "keep the answer (needs a CUDA device)"
)

DTYPES = ("bfloat16", "float16", "float32")
TOKENS = 32768


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model whose shapes are taken, the settings of its cache, and its size."""
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="Hugging Face id, local folder, GGUF file, or 'demo'; only its config is read",
    )
    common.add_cache_arguments(parser)
    add(
        "--tokens",
        type=common.positive,
        default=TOKENS,
        metavar="N",
        help=f"slots of the cache, which is filled with random codes (default: {TOKENS}); caches "
        "of up to 8192, of up to 32768 and of more have kernels of their own",
    )
    add("--batch", type=common.positive, default=1, metavar="B", help="rows (default: 1)")
    add("--dtype", choices=DTYPES, help="of the model (default: what this GPU runs models in)")


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Measure, print what was used before and what will be, and return every launch tried."""
    import skv_compile as skv

    config = skv.Config(**common.overrides(args))
    import torch

    if not torch.cuda.is_available():
        raise common.UsageError(
            "skv tune needs a CUDA device: torch.cuda.is_available() is False here."
        )
    from skv_compile import models, tune
    from skv_compile.cache.layer import group_of
    from skv_compile.codec.rotary import rotary_plan

    device = torch.device("cuda", torch.cuda.current_device())
    dtype = getattr(torch, args.dtype) if args.dtype else models.default_dtype(device)
    with screen.step("Config of the model") as update:
        model = _config(args.model, update)
    cache = skv.SphericalCache(model, args.tokens, config)  # refuses what it cannot be
    own = _layer_config(cache)
    heads, dim = _shape(own)
    with screen.step("Tuning") as update:
        found = tune.tune(
            config,
            heads,
            group_of(own),
            dim,
            dtype,
            args.tokens,
            args.batch,
            device,
            turn=rotary_plan(model, dim),
            layers=len(cache.layers) - cache.journal.dense_layers,
            report=update,
        )
    show(found, screen)
    return {"model": args.model, "dtype": str(dtype).removeprefix("torch."), **found}


def _config(name: str, report: Any) -> Any:
    """A model's config, without its weights."""
    from transformers import AutoConfig

    from skv_compile import models

    folder, gguf = models.locate(name, report)
    try:
        return AutoConfig.from_pretrained(folder, **({"gguf_file": gguf} if gguf else {}))
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise models.ModelError(f"could not read the config of {name}: {first}") from error


def _layer_config(cache: Any) -> Any:
    """The config of the compressed layers, which all need the same launch."""
    from skv_compile.cache.layer import SphericalLayer

    own = [layer.model_config for layer in cache.layers if isinstance(layer, SphericalLayer)]
    shapes = sorted({_shape(config) for config in own})
    if len(shapes) > 1:
        words = " and ".join(f"{heads} kv heads of dim {dim}" for heads, dim in shapes)
        raise common.UsageError(
            f"the compressed layers of this model have several shapes ({words}), and skv tune "
            "measures one. The built-in launches serve them untuned."
        )
    return own[0]


def _shape(model: Any) -> tuple[int, int]:
    """Kv heads of a layer, and their dim."""
    text = model.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return heads, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def show(found: dict[str, Any], screen: Screen) -> None:
    """Print the launch before and after, and where it is kept."""
    from rich import box
    from rich.table import Table

    columns = ("", "programs an SM", "warps", "stages", "registers", "warps of prepare", "ms")
    view = Table(*columns, box=box.SIMPLE_HEAD)
    for title, key in (("built in", "before"), ("tuned", "after")):
        launch, ms = found[key], found[f"{key}_ms"]
        view.add_row(
            title,
            str(launch["pages_per_sm"]),
            str(launch["pages_warps"]),
            str(launch["pages_stages"]),
            str(launch["pages_registers"] or "any"),
            str(launch["prepare_warps"]),
            "fails" if ms is None else f"{ms:.4g}",
        )
    screen.print(view)
    failed = Counter(trial["error"] for trial in found["trials"] if trial["error"])
    for error, count in failed.items():
        screen.write(f"{count} launches failed: {error}")
    screen.write(
        f"One attention of {found['tokens']} slots x {found['batch']} on {found['device']}; "
        f"{len(found['trials'])} launches tried.\n"
        f"{found['file']}: used by processes that begin from now on, on devices of this name, for "
        "every cache that has the same kernels. Delete it to go back."
    )
