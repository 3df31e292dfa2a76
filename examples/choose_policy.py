"""Which retention policy? Measure two at the same stored bytes, on your own text.

Run: python examples/choose_policy.py [FILE.txt]  (fetches the demo model)
"""

from __future__ import annotations

import sys

import skv_compile as skv
from skv_compile import evaluate
from skv_compile.models import load

BITS = 1.625
PREFIX, TOKENS = 1024, 128  # in the cache, and scored through it


def main() -> None:
    loaded = load("demo")
    texts = evaluate.read_texts(sys.argv[1:])  # a part of Python's language reference
    documents = evaluate.tokenize(texts, loaded.tokenizer.encode, PREFIX + TOKENS + 1, "cpu")

    print("policy      bits    KL, nats   same top-1   tokens dropped")
    for retention in ("rdr", "snapkv"):
        config = skv.Config(bits=BITS, retention=retention)
        result = evaluate.evaluate(loaded.model, documents, PREFIX, config)
        mean, cost = result["summary"], result["cost"]
        dropped, kept = cost["tokens_dropped"], sum(cost["tokens_by_tier"])
        print(
            f"{retention:10} {cost['bits_per_coordinate']:5.3f} {mean['kl_mean']:10.4f} "
            f"{100 * mean['same_top1']:10.1f} % {100 * dropped / (dropped + kept):12.1f} %"
        )


if __name__ == "__main__":
    main()
