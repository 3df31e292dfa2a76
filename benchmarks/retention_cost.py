"""What retention costs: its part of a prompt's forward, and of the steps between two refreshes.

    python benchmarks/retention_cost.py [--prefix 3072] [--json FILE]

Medians, side by side in one run: the prompt through an exact cache, through a compressed one that
keeps every token, and through one with retention; the time spent on judging tokens (utilities);
then single compiled steps, and the refresh that every ``stride`` of them pays for.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import skv_compile as skv
from skv_compile import evaluate, models
from skv_compile.commands import common
from skv_compile.commands.screen import Screen
from skv_compile.retention.judge import Judge
from skv_compile.retention.keeper import Keeper

RESULTS = Path(__file__).parent / "results" / "retention_cost.json"


class Timed:
    """Seconds spent in a method of a class while the block runs."""

    def __init__(self, owner: type, name: str, device: torch.device) -> None:
        self._owner, self._name, self._device = owner, name, device
        self._method: Any = getattr(owner, name)
        self.seconds: list[float] = []

    def __enter__(self) -> Timed:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = clock(self._device)
            out = self._method(*args, **kwargs)
            self.seconds.append(clock(self._device) - start)
            return out

        setattr(self._owner, self._name, timed)
        return self

    def __exit__(self, *error: object) -> None:
        setattr(self._owner, self._name, self._method)


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median_of(run: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Median seconds of ``repeats`` runs after one that warms up."""
    run()
    seconds = []
    for _ in range(repeats):
        start = clock(device)
        run()
        seconds.append(clock(device) - start)
    return statistics.median(seconds)


@torch.no_grad()
def measure(model: Any, ids: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """All of it, in seconds."""
    device, repeats = ids.device, args.repeats
    length = len(ids) + args.steps + 8

    def cache(retention: str) -> skv.SphericalCache:
        config = skv.Config(bits=args.bits, retention=retention)
        return skv.SphericalCache(model.config, max_cache_len=length, config=config)

    def prompt(past: Any) -> None:
        evaluate.fill(model, ids, past)

    found: dict[str, Any] = {
        "prompt_exact": median_of(
            lambda: prompt(DynamicCache(config=model.config)), device, repeats
        ),
        "prompt_none": median_of(lambda: prompt(cache("none")), device, repeats),
    }
    with Timed(Judge, "judge", device) as judged:
        found["prompt_rdr"] = median_of(lambda: prompt(cache("rdr")), device, repeats)
    found["utilities"] = sum(judged.seconds) / (repeats + 1)
    found["utilities_of_prompt"] = found["utilities"] / found["prompt_rdr"]

    skv.compile(model, bits=args.bits)
    past = cache("rdr")
    model(ids[None], past_key_values=past)
    token = ids[None, -1:]
    with Timed(Keeper, "maintain", device) as kept:
        seconds = []
        for _ in range(args.steps):
            start = clock(device)
            model(token, past_key_values=past)
            seconds.append(clock(device) - start)
    refreshes = sorted(kept.seconds)[-max(1, args.steps // 64 - 1) :]
    stride = past.keepers[0].layout.stride
    found["step"] = statistics.median(seconds)
    found["refresh"] = statistics.median(refreshes)
    found["refresh_of_a_stride"] = found["refresh"] / (stride * found["step"])
    found["stride"] = stride
    return found


def main(argv: list[str]) -> int:
    """Measure, write the JSON, print it."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prefix", type=common.positive, default=3072)
    parser.add_argument("--steps", type=common.positive, default=200)
    parser.add_argument("--repeats", type=common.positive, default=3)
    parser.add_argument("--bits", type=float, default=1.125)
    parser.add_argument("--device")
    parser.add_argument("--threads", type=common.positive)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", default=str(RESULTS))
    args = parser.parse_args(argv)
    screen = Screen()
    common.check_writable(args.json)
    if args.threads:
        torch.set_num_threads(args.threads)
    loaded = models.load(args.model, device=args.device, dtype=getattr(torch, args.dtype))

    def encode(words: str) -> list[int]:
        return loaded.tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]

    texts = evaluate.read_texts([])
    (document,) = evaluate.tokenize(texts, encode, args.prefix, loaded.device)
    found = measure(loaded.model, document.ids, args)
    result = {
        "device": common.device_name(loaded.device),
        "model": args.model,
        "protocol": {k: getattr(args, k) for k in ("prefix", "steps", "bits", "dtype", "repeats")},
        "seconds": found,
    }
    common.write_json(
        args.json, shlex.join(["python", "benchmarks/retention_cost.py", *argv]), result
    )
    for name, value in found.items():
        screen.write(f"{name:22s} {value:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
