"""Look at this machine and say what will work on it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.table import Table

Status = Literal["ok", "warn", "missing"]
_DISTRIBUTION = "skv-compile"
_STYLES = {"ok": "green", "warn": "yellow", "missing": "bold red"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One finding. ``missing`` is essential, ``warn`` costs a part of the functions."""

    name: str
    status: Status
    detail: str
    remedy: str = ""

    def to_dict(self) -> dict[str, str]:
        """The fields, for JSON."""
        return dataclasses.asdict(self)


def collect() -> list[Row]:
    """Every finding, requirements first, then what will work here."""
    parts = [_python(), *_required(), _triton(), _device(), _compiler(), _headers(), _native()]
    parts.append(_backend())
    parts += [_optional("gguf", "demo", "the demo model and GGUF files")]
    parts += [_optional("accelerate", "demo", "the demo model and GGUF files")]
    parts += [_optional("matplotlib", "bench", "plots")]
    return parts + list(_abilities({row.name: row for row in parts}))


def table(rows: Iterable[Row]) -> Table:
    """The rows as a rich table."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    view = Table("", "status", "found", "what to do", box=box.SIMPLE_HEAD)
    for row in rows:
        status = Text(row.status, style=_STYLES[row.status])
        view.add_row(Text(row.name), status, Text(row.detail), Text(row.remedy))
    return view


def _python() -> Row:
    where = f"{platform.system()} {platform.machine()}"
    return Row("python", "ok", f"{platform.python_version()}, {where}")


def _required() -> list[Row]:
    """torch and transformers, against the versions this package asks for."""
    wanted = _requirements()
    rows = []
    for name in ("torch", "transformers"):
        found, specifier = _version(name), wanted.get(name)
        text = f" (needs {specifier})" if specifier else ""
        if found is None:
            rows.append(Row(name, "missing", f"not installed{text}", f"pip install {name}"))
        elif specifier and not specifier.contains(found, prereleases=True):
            remedy = f"pip install '{name}{specifier}'"
            rows.append(Row(name, "missing", f"{found} is too old{text}", remedy))
        else:
            rows.append(Row(name, "ok", found))
    return rows


def _requirements() -> dict[str, Any]:
    """The version specifiers of the installed distribution; empty from a bare checkout."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {r.name: r.specifier for r in map(Requirement, lines)}


def _triton() -> Row:
    found = _version("triton") or _version("triton-windows")
    if found:
        return Row("triton", "ok", found)
    if _cuda():
        return Row("triton", "warn", "not installed", "pip install triton (kernels on CUDA)")
    return Row("triton", "ok", "not installed; only CUDA needs it")


def _device() -> Row:
    if not _version("torch"):
        return Row("device", "missing", "unknown without torch", "pip install torch")
    import torch

    if not _cuda():
        built = torch.version.cuda or getattr(torch.version, "hip", None)
        why = "no CUDA device seen" if built else "this torch has no CUDA"
        return Row("device", "ok", f"CPU, {torch.get_num_threads()} threads; {why}")
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    words = [f"{card.name} ({card.total_memory / 1e9:.0f} GB)" for card in cards]
    return Row("device", "ok", ", ".join(words))


def _compiler() -> Row:
    remedy = "install g++ or clang++ (Debian: apt install g++), or set CXX"
    chosen = os.environ.get("CXX")
    names = [chosen] if chosen else ["g++", "clang++", "c++"]
    for name in names:
        words = shlex.split(name)
        if words and (path := shutil.which(words[0])):
            try:
                done = subprocess.run(
                    [path, "--version"],
                    capture_output=True,
                    text=True,
                    timeout=20,
                    stdin=subprocess.DEVNULL,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                return Row("C++ compiler", "warn", f"{name} does not run: {error}", remedy)
            first = (done.stdout or done.stderr).splitlines()[:1]
            return Row("C++ compiler", "ok", first[0] if first else name)
    detail = f"CXX={chosen} not found" if chosen else "none found"
    return Row("C++ compiler", "warn", f"{detail}; compiled CPU code needs one", remedy)


def _headers() -> Row:
    include = sysconfig.get_paths().get("include", "")
    if (Path(include) / "Python.h").exists():
        return Row("Python headers", "ok", "found")
    return Row(
        "Python headers",
        "warn",
        "Python.h not found; compiled CPU code needs it",
        "Debian: apt install python3-dev",
    )


def _native() -> Row:
    """The CPU kernels: builds them where that was not done yet."""
    name = "CPU kernels"
    if not _version("torch"):
        return Row(name, "missing", "unknown without torch", "pip install torch")
    from .errors import SkvError
    from .lowering.cpu import library

    try:
        variant = library.variant()
        if variant is None:
            return Row(name, "warn", f"{library.SWITCH}=reference turns them off")
        library.build(variant)
    except SkvError as error:
        return Row(name, "warn", f"{error}; attention runs on PyTorch, which is slower")
    return Row(name, "ok", f"{variant} (this CPU can run {', '.join(library.possible())})")


def _backend() -> Row:
    points = importlib.metadata.entry_points(group="torch_dynamo_backends")
    point = next((p for p in points if p.name == "skv"), None)
    if point is None:
        return Row(
            "backend 'skv'",
            "warn",
            "not registered; torch.compile(backend='skv') will not find it",
            f"pip install {_DISTRIBUTION} (in a checkout: pip install -e .)",
        )
    if importlib.util.find_spec(point.value.split(":")[0]) is None:
        remedy = f"pip install --force-reinstall --no-deps {_DISTRIBUTION}"
        return Row("backend 'skv'", "missing", f"registered, but {point.value} is gone", remedy)
    return Row("backend 'skv'", "ok", f"registered as {point.value}")


def _optional(name: str, extra: str, use: str) -> Row:
    found = _version(name)
    if found:
        return Row(name, "ok", found)
    remedy = f"pip install '{_DISTRIBUTION}[{extra}]'"
    return Row(name, "warn", f"not installed; needed for {use}", remedy)


def _abilities(rows: dict[str, Row]) -> Iterable[Row]:
    """What the findings above add up to."""

    def works(name: str, *needs: str, extra: str = "") -> Row:
        bad = [n for n in needs if rows[n].status != "ok"]
        if bad or extra:
            reason = ", ".join(bad) + (", " if bad and extra else "") + extra
            return Row(name, "warn", f"will not work: {reason}")
        return Row(name, "ok", "will work")

    yield works("CPU, eager reference", "torch", "transformers")
    yield works("CPU, compiled", "torch", "transformers", "C++ compiler", "Python headers")
    if _cuda():
        yield works("CUDA, compiled", "torch", "transformers", "triton")
        from .lowering.kernels import SWITCH, turned_off

        extra = f"{SWITCH}=reference turns them off" if turned_off() else ""
        yield works("CUDA kernels", "triton", extra=extra)
    pip = "" if importlib.util.find_spec("pip") else "pip is not installed"
    yield works("skv demo", "torch", "transformers", "gguf", "accelerate", extra=pip)


def _cuda() -> bool:
    if not _version("torch"):
        return False
    import torch

    return torch.cuda.is_available()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
