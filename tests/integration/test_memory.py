"""What the process really takes: no dense cache is ever allocated."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys, threading, time
import psutil, torch
torch.set_num_threads(1)
import skv_compile as skv
from transformers import LlamaConfig

LAYERS, HEADS, DIM, TOKENS, CHUNK = 3, 4, 128, 32768, 1024
mode = sys.argv[1]
config = LlamaConfig(
    hidden_size=HEADS * DIM, num_attention_heads=HEADS, num_key_value_heads=HEADS,
    num_hidden_layers=LAYERS, head_dim=DIM, vocab_size=8, intermediate_size=8,
)
process = psutil.Process()
k = torch.randn(1, HEADS, CHUNK, DIM)

def run(tokens):
    cache = skv.SphericalCache(config, tokens, bits=2.125, retention="none")
    for _ in range(tokens // CHUNK - 1):
        for layer in cache.layers:
            keys, _ = layer.update(k, k)
            if mode == "dense":
                keys._pending.dense()
            else:
                keys._pending._store(None, k, 1.0)
    one = k[:, :, :1].contiguous()
    for layer in cache.layers:
        keys, _ = layer.update(one, one)
        out = torch.nn.functional.scaled_dot_product_attention(one, keys, _)
        assert torch.isfinite(out).all()
    return cache

run(2 * CHUNK)  # imports, thread pools, frames
before = process.memory_info().rss
peak, done = before, False

def watch():
    global peak
    while not done:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
cache = run(TOKENS)
done = True
thread.join()
print(json.dumps({
    "rise": peak - before,
    "resident": cache.resident_bytes,
    "dense": cache.dense_bytes,
    "layer": cache.dense_bytes // LAYERS,
}))
"""


def measure(mode: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_filling_and_reading_32k_tokens_takes_their_compressed_size_and_little_more() -> None:
    """Filled in chunks of 1024: the working set is that of a chunk, not of a dense layer."""
    sizes = measure("codes")
    assert sizes["dense"] == 3 * 2 * 4 * 32768 * 128 * 4
    assert sizes["resident"] < sizes["dense"] / 13  # 2.125 of 32 bits, and the exact region
    assert sizes["rise"] < sizes["resident"] + sizes["layer"]


@pytest.mark.slow
def test_the_measure_sees_a_dense_layer() -> None:
    """What the test above would show if a layer were made dense."""
    sizes = measure("dense")
    assert sizes["rise"] > sizes["resident"] + sizes["layer"]
