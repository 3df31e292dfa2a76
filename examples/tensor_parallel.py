"""A model split over several processes: each keeps the kv heads that are its own.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py [MODEL]

Runs on CPUs (gloo) as well as on GPUs (nccl). Without MODEL a small random Llama is made. MODEL's
kv heads have to be divisible by the number of processes. `bits` and `budget` are of each rank.
"""

import sys
import tempfile

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import skv_compile as skv


def random_model() -> str:
    """A folder with a small Llama, made by the first process."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
        config = AutoConfig.for_model("llama", vocab_size=512, **sizes, **heads)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder[0])
    dist.barrier()
    return folder[0]


def main() -> None:
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    name = sys.argv[1] if len(sys.argv) > 1 else random_model()
    split = DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(name, distributed_config=split).eval()
    skv.compile(model, bits=2.125, retention="none")
    ids = torch.arange(400, device=model.device)[None] % model.config.vocab_size
    out = model.generate(ids, max_new_tokens=32, do_sample=False, eos_token_id=None)
    cache = model._skv.cache
    line = (
        f"rank {dist.get_rank()}: {cache.states[0].heads} kv heads, "
        f"{cache.dense_bytes:,} bytes dense, {cache.resident_bytes:,} now, "
        f"last tokens {out[0, -4:].tolist()}"
    )
    lines = [""] * dist.get_world_size()
    dist.all_gather_object(lines, line)
    if dist.get_rank() == 0:
        print("\n".join(lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
