"""A decoding step of a model that is split over GPUs, against HF's static cache split alike.

    torchrun --nproc-per-node N benchmarks/tensor_parallel.py [--tokens N] [--json FILE]

The model has Llama-3-8B's shapes, four layers and random weights, the caches random contents.
With one process it is the model whole. First, in float32 and on a short prompt, whether the tokens
with the identity codec are those of a dense cache.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache
from transformers.distributed import DistributedConfig

import skv_compile as skv
from skv_compile.bench.fill import fill
from skv_compile.bench.timing import times
from skv_compile.commands import common

LAYERS, HEADS, DIM, STEPS, SLACK = 4, 8, 128, 256, 1024
OURS = {"uniform 2.0625": {"bits": 2.125, "retention": "none"}, "rdr 1.125": {"bits": 1.125}}


def checkpoint() -> str:
    """A folder with the model, written by the first process."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        sizes = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336}
        heads = {"num_attention_heads": 32, "num_key_value_heads": HEADS}
        config = AutoConfig.for_model("llama", num_hidden_layers=LAYERS, **sizes, **heads)
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder[0])
    dist.barrier()
    return folder[0]


def load(folder: str, dtype: torch.dtype) -> Any:
    """This process's part of the model."""
    more: dict[str, Any] = {"device_map": "cuda"}
    if dist.get_world_size() > 1:
        plan = DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
        more = {"distributed_config": plan}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **more).eval()


def same_tokens(folder: str) -> bool:
    """Whether generate() with the identity codec gives the tokens of a dense cache."""
    model = load(folder, torch.float32)
    torch.manual_seed(0)
    ids = torch.randint(0, 1000, (1, 200), device=model.device)
    settings = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None}
    want = model.generate(ids, **settings)
    skv.compile(model, codec="identity", retention="none")
    return torch.equal(model.generate(ids, **settings), want)


def step(model: Any, name: str, tokens: int) -> dict[str, Any]:
    """Median time of a compiled step at ``tokens``, and the bytes of this rank's cache."""
    torch._dynamo.reset()
    heads = HEADS // dist.get_world_size()
    backend, size = "inductor", tokens + SLACK
    if name in OURS:
        backend, cache = "skv", skv.SphericalCache(model.config, size, **OURS[name])
    else:
        cache = StaticCache(config=model.config, max_cache_len=size)
    cache.early_initialization(1, heads, DIM, torch.bfloat16, model.device)
    if name in OURS:
        fill(cache.states, tokens)
        held = cache.resident_bytes
    else:
        for layer in cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(tokens)
        held = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
    run_one = torch.compile(model.forward, backend=backend, mode="reduce-overhead", fullgraph=True)
    ids = torch.randint(0, 1000, (1, 1), device=model.device)
    dist.broadcast(ids, 0)
    position = torch.full((1, 1), tokens, device=model.device)

    def run() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        run_one(ids, position_ids=position, past_key_values=cache)
        position.add_(1)

    with torch.no_grad():
        for _ in range(6 + (STEPS if name in OURS else 0)):
            run()
        dist.barrier()
        each = sorted(times(run, STEPS))
    return {"name": name, "ms": each[STEPS // 2], "mean_ms": sum(each) / STEPS, "bytes": held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    dist.init_process_group("cpu:gloo,cuda:nccl")
    torch.cuda.set_device(dist.get_rank())
    folder = checkpoint()
    found: dict[str, Any] = {"processes": dist.get_world_size(), "lines": []}
    found["device"] = torch.cuda.get_device_name()
    found["identity_gives_the_tokens_of_dense"] = same_tokens(folder)
    model = load(folder, torch.bfloat16)
    for tokens in args.tokens:
        for name in ("HF static", *OURS):
            line = {"tokens": tokens, **step(model, name, tokens)}
            found["lines"].append(line)
            if dist.get_rank() == 0:
                print(line, flush=True)
    if dist.get_rank() == 0 and args.json:
        words = ["torchrun", "--nproc-per-node", str(dist.get_world_size()), *sys.argv]
        common.write_json(args.json, shlex.join(words), found)
    torch._dynamo.reset()  # graphs hold the communicator
    gc.collect()
    torch.cuda.synchronize()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
