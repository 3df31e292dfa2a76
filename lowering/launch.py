"""How the kernels of a forward are launched: as ``skv tune`` measured it on this device, or by a
small table."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..files import cache_folder, replacing
from .generate import Spec, source
from .layout import DIGITS_PER_WORD, Layout

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launch:
    """How the kernels are launched: warps of each, stages and registers of ``pages``, and how
    many of its programs share a multiprocessor."""

    pages_warps: int = 1
    pages_stages: int = 3
    pages_registers: int | None = None
    pages_per_sm: int = 8
    prepare_warps: int = 4

    @staticmethod
    @cache
    def of(spec: Spec, device: torch.device) -> Launch:
        """The one for a spec on a device. Buffers are sized by it and every launch asks again, so
        it stays what it is for the life of a process, whatever is tuned meanwhile."""
        return tuned(general(spec, device), name_of(device)) or Launch.built_in(spec)

    @staticmethod
    def built_in(spec: Spec) -> Launch:
        """The one that has worked best on an H100 for this kind of spec."""
        layout = Layout.parse(spec.layout)
        words = max(max(tier) for tier in layout.tiers) // DIGITS_PER_WORD
        if spec.columns > 16:  # sums of many rows need the registers of more warps
            return Launch(pages_warps=min(4, spec.columns // 16), pages_per_sm=4)
        if spec.columns == 8 and (layout.tracked or words <= 16):
            return Launch(pages_registers=160, pages_per_sm=12)
        return Launch(pages_warps=2, pages_per_sm=6)


@cache
def same_kernels(layout: str) -> str:
    """The key of the layout that stands for all that have the same kernels: a cache of another
    length compiles nothing."""
    found = replace(Layout.parse(layout), max_tokens=0, calibrate=0, observed=0)
    return found.key


def chains(device: torch.device) -> bool:
    """Whether a kernel can be launched on a GPU before the one before it has ended."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def name_of(device: torch.device) -> str:
    """What a device is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def general(spec: Spec, device: torch.device) -> Spec:
    """The spec whose launch all that differ from it only in length and mask share."""
    raw = device.type == "cuda"
    layout, chained = same_kernels(spec.layout), raw and chains(device)
    return replace(spec, layout=layout, mask="none", mask_min=0.0, raw=raw, chained=chained)


# ---------------------------------------------------------------- what was measured


def file_of(spec: Spec, device: str) -> Path:
    """Where the launch of a general spec on devices of this name is kept."""
    name = hashlib.sha256(f"{spec}|{device}".encode()).hexdigest()[:20]
    return cache_folder() / "launch" / f"{name}.json"


@cache
def tuned(spec: Spec, device: str) -> Launch | None:
    """What was measured for a general spec, if it was. Looked up once a process; a file that holds
    no more is not used, and a warning says so."""
    path = file_of(spec, device)
    try:
        return _read(path, spec)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning(
            "%s is not used: %s. The kernels are launched with built-in settings, which some "
            "devices run slower with. Run skv tune again, or delete the file.",
            path,
            error,
        )
        return None


def save(spec: Spec, device: str, launch: Launch, about: dict[str, Any]) -> Path:
    """Keep what was measured for a general spec, for processes that begin later."""
    path = file_of(spec, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"device": device, "spec": asdict(spec), **_made_with(spec), "launch": asdict(launch)}
    with replacing(path) as temporary:
        Path(temporary).write_text(json.dumps(record | about, indent=2) + "\n", encoding="utf-8")
    return path


def _made_with(spec: Spec) -> dict[str, str]:
    """What a measurement depends on beside the device."""
    return {
        "source": hashlib.sha256(source(spec).encode()).hexdigest(),
        "triton": triton_version(),
    }


def triton_version() -> str:
    """Of the Triton that compiles the kernels."""
    import triton

    return triton.__version__


def _read(path: Path, spec: Spec) -> Launch:
    """The launch in a file.

    Raises:
        OSError, ValueError: there is none that can be used.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not isinstance(found.get("launch"), dict):
        raise ValueError("it is not what skv tune writes")
    for key, now in _made_with(spec).items():
        if found.get(key) != now:
            what = "of the kernels" if key == "source" else "of Triton"
            raise ValueError(f"it was measured with another version {what}")
    launch = found["launch"]
    if set(launch) != {field.name for field in fields(Launch)}:
        raise ValueError(f"it has settings called {', '.join(launch)}")
    for name, value in launch.items():
        if value is None and name == "pages_registers":
            continue
        whole = type(value) is int and 1 <= value <= 255
        if not whole or (name.endswith("_warps") and value & (value - 1)):
            raise ValueError(f"{name}={value!r} cannot be")
    return Launch(**launch)
