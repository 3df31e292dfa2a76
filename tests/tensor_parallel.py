"""What a process of a tensor-parallel model finds, or one process alone: run by
``integration/test_tensor_parallel.py`` under torchrun. Prints JSON in the first process."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, StaticCache
from transformers.distributed import DistributedConfig

import skv_compile as skv
from skv_compile import metrics

PREFIX, TOKENS, NEW = 300, 64, 24
BUDGET = 210_000  # bytes of a rank


def main(folder: str) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    more: dict[str, Any] = {}
    if world > 1:
        more["distributed_config"] = DistributedConfig(tp_size=world, tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(folder, **more).eval()
    torch.manual_seed(1)
    ids = torch.randint(2, 128, (1, PREFIX + TOKENS))
    dense = StaticCache(config=model.config, max_cache_len=ids.shape[1])
    exact = metrics.score_continuation(model, ids, PREFIX, dense)
    found: dict[str, Any] = {}
    for name, settings in {
        "uniform": {"bits": 2.125, "retention": "none"},
        "budget": {"budget": BUDGET, "page_tokens": 8},
    }.items():
        cache = skv.SphericalCache(model.config, ids.shape[1], **settings)
        got = metrics.score_continuation(model, ids, PREFIX, cache)
        kl = metrics.compare(exact, got, ids[0, PREFIX:].roll(-1)).kl_mean
        found[name] = {"kl": kl, "bytes": cache.resident_bytes, "heads": cache.states[0].heads}
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    found["dense"] = model.generate(ids, **settings)[0, -NEW:].tolist()
    if world > 1:
        skv.compile(model, codec="identity", retention="none")
    found["compiled"] = model.generate(ids, **settings)[0, -NEW:].tolist()
    every = [found]
    if world > 1:
        every = [None] * world
        dist.all_gather_object(every, found)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(every))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
