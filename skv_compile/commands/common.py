"""What several commands share: arguments, versions, the JSON file, timing of tokens."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from skv_compile.errors import SkvError
from skv_compile.files import replacing
from skv_compile.versions import versions

#: Decoding steps left out of a speed: they contain compilation and its warm-up.
WARM_UP_STEPS = 8

#: Settings of the cache that commands take, as they are called in ``Config``.
CACHE_SETTINGS = ("bits", "codec", "frame", "retention", "retention_table", "budget")


class UsageError(SkvError):
    """Arguments that cannot be meant."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """``--model``, and the settings of the cache."""
    parser.add_argument(
        "--model",
        default="demo",
        metavar="M",
        help="Hugging Face id, local folder, GGUF file, or 'demo' (the default): "
        "SmolLM2-135M-Instruct from the package registry",
    )
    add_cache_arguments(parser)


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of the cache."""
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="settings by name: exact, quality, balanced or small; what is set beside it counts",
    )
    parser.add_argument(
        "--bits",
        type=float,
        metavar="B",
        help="bits per coordinate of the compressed region (4.125)",
    )
    parser.add_argument(
        "--codec",
        metavar="C",
        help="how pages are coded: frame (the default), grid, rings, or identity, which is exact",
    )
    parser.add_argument(
        "--frame", metavar="FILE", help="frames of this model, written by skv calibrate --out"
    )
    parser.add_argument(
        "--retention",
        metavar="NAME",
        help="which tokens are kept, and how well: rdr (the default), none, which keeps all alike, "
        "streaming, snapkv, h2o, window, prefix or retrieval",
    )
    parser.add_argument(
        "--retention-table",
        metavar="FILE",
        help="for --retention retrieval, written by skv calibrate --retrieval-heads",
    )
    parser.add_argument(
        "--budget", metavar="SIZE", help="most bytes of the whole cache, such as 500MB or 2GiB"
    )


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The settings the user named, checked now rather than after the model has loaded."""
    import skv_compile as skv
    from skv_compile.config import PRESETS

    chosen = {k: v for k in CACHE_SETTINGS if (v := getattr(args, k)) is not None}
    if args.preset is not None:
        skv.Config.preset(args.preset)
        chosen = PRESETS[args.preset] | chosen
    skv.Config(**chosen)
    return chosen


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, not {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def device_name(device: Any) -> str:
    """A torch device in words."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def load_average() -> float | None:
    """Programs that wanted a core over the last minute; None where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def check_writable(file: str, option: str = "--json") -> None:
    """Refuse the file of an option that cannot be written before the work starts."""
    path = Path(file)
    if path.is_dir():
        raise UsageError(f"{option} {file}: this is a folder, give a file")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{option} {file}: the folder {path.parent} does not exist")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UsageError(f"{option} {file}: the folder {path.parent} cannot be written")


def write_text(file: str, text: str) -> None:
    """Write a file, whole or not at all."""
    with replacing(Path(file).absolute()) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def write_json(file: str, command: str, result: dict[str, Any]) -> None:
    """Write ``result`` with the command and versions that made it, whole or not at all."""
    record = {
        "command": command,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        **result,
    }
    write_text(file, json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


class TokenTimer:
    """A ``generate`` streamer that notes when each token came, and can pass tokens on.

    ``each`` is called for every new token, before ``then`` gets it. What they take is not counted.
    """

    def __init__(self, each: Callable[[], None] = lambda: None, then: Any = None) -> None:
        self._each, self._then = each, then
        self.times: list[float] = []
        self._prompt = True
        self._aside = 0.0  # seconds in ``each`` and ``then``

    def put(self, tokens: Any) -> None:
        """Called by ``generate`` with the prompt, then with every new token."""
        now = time.perf_counter()
        self.times.append(now - self._aside)
        if not self._prompt:
            self._each()
        self._prompt = False
        if self._then is not None:
            self._then.put(tokens)
        self._aside += time.perf_counter() - now

    def end(self) -> None:
        """Called by ``generate`` when it is done."""
        if self._then is not None:
            self._then.end()

    def speed(self, left_out: int = WARM_UP_STEPS) -> dict[str, float | int | None]:
        """Tokens per second of decoding and how they were counted, in plain numbers.

        ``times`` begins with the prompt, then the first token (made by the prefill); every
        later difference is one decoding step. The first ``left_out`` of them hold
        compilation and are reported as their own time. The speed is that of the median step,
        which another program on the machine disturbs least.
        """
        between = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
        prefill, steps = (between[0] if between else 0.0), between[1:]
        counted = steps[left_out:]
        median = statistics.median(counted) if counted else None
        return {
            "tokens_per_second": 1 / median if median else None,
            "median_step_seconds": median,
            "mean_step_seconds": statistics.fmean(counted) if counted else None,
            "steps_counted": len(counted),
            "steps_left_out": min(len(steps), left_out),
            "prefill_seconds": prefill,
            "first_steps_seconds": sum(steps[:left_out]),
        }


@contextlib.contextmanager
def forwards(screen: Any, title: str, model: Any, count: int = 1) -> Iterator[None]:
    """Show how far the block has come: it runs ``count`` eager forwards, layer after layer."""
    from torch.nn import ModuleList

    text = model.config.get_text_config(decoder=True)
    wanted = getattr(text, "num_hidden_layers", None)
    stacks = (x for x in model.modules() if isinstance(x, ModuleList) and len(x) == wanted)
    layers = next(stacks, ())
    with screen.bar(title, count * len(layers)) as advance:
        hooks = [layer.register_forward_hook(lambda *_: advance()) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def size(count: float) -> str:
    """Bytes for people: 12.3 MB."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
