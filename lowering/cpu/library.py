"""The native library: which variant this CPU gets, building it, and the types of its functions.

It includes no header of torch, so that it builds in seconds. The result is kept in a file named
after everything that went into it: sources, compiler, flags and variant.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from ...files import cache_folder, replacing
from ..codes import GAINS, RADIUS_STEPS_PER_OCTAVE, RADIUS_ZERO, UNBIASED_CAP
from ..errors import SkvError

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "src"
SWITCH = "SKV_CPU"  # environment: one of VARIANTS, or "reference"
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
#: name -> flags, and what the CPU must have (as Linux names it), best first
VARIANTS: dict[str, tuple[tuple[str, ...], frozenset[str]]] = {
    "vnni": (
        (*_AVX512, "-mavx512vnni", "-mprefer-vector-width=512"),
        frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "fma", "f16c"}),
    ),
    "avx512": (
        (*_AVX512, "-mprefer-vector-width=512"),
        frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "f16c"}),
    ),
    "avx2": (_AVX2, frozenset({"avx2", "fma", "f16c"})),
    "portable": (("-DSKV_PORTABLE",), frozenset()),
}
_FLAGS = (
    "-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-std=c++17", "-fPIC",
    "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
    "-fvisibility=hidden", "-w",
)  # fmt: skip
TIMEOUT = 300  # seconds; it takes two to three


class BuildError(SkvError):
    """The native library could not be built."""


@cache
def cpu_features() -> frozenset[str]:
    """What this CPU can do, in the words of /proc/cpuinfo; nothing where that says nothing."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def possible() -> list[str]:
    """The variants that this CPU can run, best first."""
    return [name for name, (_, needs) in VARIANTS.items() if needs <= cpu_features()]


def variant() -> str | None:
    """The variant to use; None for the reference.

    Raises:
        SkvError: the environment asks for one that there is not, or not on this CPU.
    """
    return _chosen(os.environ.get(SWITCH))[0]


def why() -> str:
    """Why it is this :func:`variant`, or none."""
    return _chosen(os.environ.get(SWITCH))[1]


@cache
def _chosen(wanted: str | None) -> tuple[str | None, str]:
    if not wanted:
        return possible()[0], f"the best that this CPU runs of {', '.join(VARIANTS)}"
    if wanted == "reference":
        return None, f"{SWITCH}=reference"
    if wanted not in VARIANTS:
        raise SkvError(f"{SWITCH}={wanted!r}: expected one of {', '.join(VARIANTS)}, reference.")
    if wanted not in possible():
        raise SkvError(
            f"{SWITCH}={wanted}: this CPU cannot run it. It can run {', '.join(possible())}."
        )
    return wanted, f"{SWITCH}={wanted}"


def compiler() -> list[str] | None:
    """The C++ compiler: ``CXX``, which may have arguments, else the first that is found."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++", "c++"]:
        words = shlex.split(name)
        if words and (path := shutil.which(words[0])):
            return [path, *words[1:]]
    return None


def constants() -> list[str]:
    """What the sources take from Python."""
    return [
        f"-DSKV_GAINS={','.join(f'{gain}f' for gain in GAINS)}",
        f"-DSKV_RADIUS_STEPS={RADIUS_STEPS_PER_OCTAVE}",
        f"-DSKV_RADIUS_ONE={RADIUS_ZERO}",
        f"-DSKV_CAP={UNBIASED_CAP}",
    ]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL
    )


def build(name: str, extra: Sequence[str] = ()) -> Path:
    """The library of a variant, built unless it is there.

    ``extra``: flags of a sanitizer, for tests.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    words = compiler()
    if words is None:
        raise BuildError(
            "there is no C++ compiler (g++ or clang++, or the one that CXX names). Install one "
            "(Debian: apt install g++)"
        )
    try:
        version = _run([*words, "--version"]).stdout.split("\n")[0]
        flags = [*_FLAGS, *VARIANTS[name][0], *constants(), *extra]
        about = hashlib.sha256(repr((words, version, flags, platform.machine())).encode())
        for source in sorted(SOURCES.iterdir()):
            about.update(source.name.encode() + source.read_bytes())
        target = cache_folder() / "cpu" / f"skv-{name}-{about.hexdigest()[:16]}.so"
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as made, tempfile.TemporaryDirectory() as folder:
            units = sorted(SOURCES.glob("*.cpp"))
            objects = [f"{folder}/{unit.stem}.o" for unit in units]
            compile_one = [*words, *flags, "-c"]
            with ThreadPoolExecutor() as pool:  # side by side
                pairs = zip(units, objects, strict=True)
                commands = [[*compile_one, str(unit), "-o", one] for unit, one in pairs]
                done = list(pool.map(_run, commands))
            if not any(one.returncode for one in done):
                done = [_run([*words, *flags, "-shared", *objects, "-o", made])]
            for one in done:
                if one.returncode:
                    raise BuildError(f"{words[0]} failed: {_first_error(one.stderr)}")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(str(error)) from error
    return target


def _first_error(text: str) -> str:
    lines = [line for line in text.splitlines() if "error" in line] or text.splitlines()
    return lines[0] if lines else "no message"


# ------------------------------------------------------------ types


def structs() -> dict[str, struct.Struct]:
    """How the structs of ``abi.h`` are packed, by name."""
    found = {}
    text = re.sub(r"//.*", "", (SOURCES / "abi.h").read_text())
    for name, body in re.findall(r"struct (\w+) \{(.*?)\};", text, re.DOTALL):
        kinds = ""
        for line in filter(str.strip, body.split(";")):
            of_double = line.split()[0] == "double" and "*" not in line
            kinds += ("d" if of_double else "q") * (line.count(",") + 1)
        found[name] = struct.Struct(kinds)
    return found


STRUCTS = structs()
FUNCTIONS = {"skv_attend": None, "skv_append": ctypes.c_int64, "skv_retain": None,
             "skv_quantise": None}  # fmt: skip


def open_library(path: Path) -> ctypes.CDLL:
    """The functions of a built library."""
    library = ctypes.CDLL(str(path))
    for name, result in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = [ctypes.c_char_p]  # a packed struct
    return library


@cache
def _loaded(name: str) -> tuple[ctypes.CDLL | None, str]:
    """The library of a variant, or why there is none."""
    try:
        return open_library(build(name)), ""
    except (BuildError, OSError) as error:
        log.warning(
            "The native CPU kernels could not be built, so attention runs on its PyTorch "
            "reference, which is slower: %s",
            error,
        )
        return None, f"the native CPU kernels could not be built: {error}"


def load() -> ctypes.CDLL | None:
    """The library for this CPU; None where the reference runs instead, which was said once."""
    name = variant()
    return None if name is None else _loaded(name)[0]


def missing() -> str:
    """Why :func:`load` gives none."""
    name = variant()
    return why() if name is None else _loaded(name)[1]
