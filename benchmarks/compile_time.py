"""Seconds until the first compiled step of a model of many layers, with a dense and with a
compressed cache, every cache of compiled code empty.

    python benchmarks/compile_time.py [--layers 32] [--json FILE]

On a GPU where there is one, with CUDA graphs, else on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "compile_time.json"
DENSE = "HF static"
OURS = {"none 2.125": {"bits": 2.125, "retention": "none"}, "rdr 1.125": {"bits": 1.125}}
TOKENS, CONTEXT = 1024, 300


def first_step(name: str, layers: int) -> None:
    """Print the seconds of the first compiled step of a small Llama, and of the next."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

    from skv_compile import SphericalCache

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
    if name == DENSE:
        cache = StaticCache(config=config, max_cache_len=TOKENS)
    else:
        cache = SphericalCache(config, TOKENS, **OURS[name])
    ids = torch.randint(0, 1024, (1, CONTEXT), device=device)
    mode = "reduce-overhead" if device == "cuda" else None
    backend = "inductor" if name == DENSE else "skv"
    step = torch.compile(model.forward, backend=backend, mode=mode, fullgraph=True)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for n in range(2):
            position = torch.tensor([[CONTEXT + n]], device=device)
            begin = time.perf_counter()
            step(ids[:, :1], position_ids=position, past_key_values=cache)
            if device == "cuda":
                torch.cuda.synchronize()
            print(json.dumps({"seconds": time.perf_counter() - begin, "device": device}))


def measure(name: str, layers: int) -> dict[str, object]:
    """:func:`first_step` in a process of its own, with empty caches."""
    with tempfile.TemporaryDirectory() as folder:
        names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "SKV_CACHE_DIR")
        own = {key: f"{folder}/{key}" for key in names}
        done = subprocess.run(
            [sys.executable, __file__, "--only", name, "--layers", str(layers)],
            env={**os.environ, **own},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    lines = [json.loads(x) for x in done.stdout.splitlines() if x.startswith("{")]
    return {"name": name, "seconds": lines[0]["seconds"], "next": lines[1]["seconds"], **lines[0]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--json", default=str(RESULTS), metavar="FILE")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        first_step(args.only, args.layers)
        return 0
    from skv_compile.commands import common

    lines = []
    for name in (DENSE, *OURS):
        lines.append(measure(name, args.layers))
        lines[-1]["ratio"] = lines[-1]["seconds"] / lines[0]["seconds"]
        print(lines[-1], flush=True)
        result = {"layers": args.layers, "lines": lines}
        common.write_json(args.json, shlex.join(["python", *sys.argv]), result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
