"""What a wheel takes along: the lists of ``pyproject.toml`` against what there is."""

from __future__ import annotations

from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[2]
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_is_listed() -> None:
    folders = {"skv_compile": ROOT / "skv_compile"}
    folders |= {f"skv_compile.{name}": ROOT / name for name in ("lowering", "patterns")}
    found = set()
    for name, folder in folders.items():
        for init in folder.rglob("__init__.py"):
            inner = init.parent.relative_to(folder).parts
            found.add(".".join((name, *inner)))
    assert found == set(SETUP["packages"])


def test_every_file_that_is_no_module_is_taken_along() -> None:
    data = {
        file
        for name in ("skv_compile", "lowering", "patterns")
        for file in (ROOT / name).rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc") and "__pycache__" not in file.parts
    }
    taken = set()
    for package, globs in SETUP["package-data"].items():
        folder = ROOT / package.replace("skv_compile.", "").replace(".", "/")
        for pattern in globs:
            taken |= set(folder.glob(pattern))
    assert data == taken
