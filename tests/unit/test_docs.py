"""The docs say what the code does: generated pages, pictures, commands and listings."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import matplotlib
import pytest

from skv_compile import cli

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md"]
EACH = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

#: Words that stand for something of the reader's.
PLACEHOLDERS = {"N": "64"}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def listings(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language; ``""``: shell."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.S | re.M)


def commands(page: Path) -> tuple[list[list[str]], ...]:
    """The command lines of a page's blocks, and those in its sentences and tables, which may be
    a part of one."""
    blocks = [line for block in listings(page, "") for line in block.splitlines()]
    rest = re.findall(r"`((?:skv|python|make) [^`]*)`", page.read_text(encoding="utf-8"))
    return tuple([shlex.split(x, comments=True) for x in lines] for lines in (blocks, rest))


def test_generated_pages_are_what_the_code_says() -> None:
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_variable_of_the_environment_is_documented() -> None:
    found = set()
    for folder in ("skv_compile", "lowering", "patterns"):
        for file in (ROOT / folder).rglob("*.py"):
            found |= set(re.findall(r'= "(SKV_[A-Z_]+)"', file.read_text(encoding="utf-8")))
    assert set(load("generate").ENVIRONMENT) == found


def test_the_picture_of_a_page_is_that_of_the_layout() -> None:
    wanted = re.search(r"matplotlib==(\S+)", (ROOT / "constraints.txt").read_text())
    assert wanted is not None
    if matplotlib.__version__ != wanted[1]:
        pytest.skip(f"pictures are drawn with matplotlib {wanted[1]}")
    assert load("pictures").drawn("page") == (DOCS / "pictures" / "page.svg").read_bytes()


def test_every_picture_is_drawn_by_the_script_and_shown() -> None:
    drawn = set(load("pictures").DRAW)
    assert {file.stem for file in (DOCS / "pictures").iterdir()} == drawn
    shown = re.findall(r"\(pictures/(\w+)\.svg\)", "".join(p.read_text() for p in PAGES))
    assert set(shown) == drawn


@EACH
def test_commands_are_ones_that_there_are(page: Path) -> None:
    parser = cli.build_parser()
    subparsers = load("generate")._subparsers(parser)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    whole, parts = commands(page)
    for words in whole:
        if words[:1] == ["skv"]:
            parser.parse_args([PLACEHOLDERS.get(word, word) for word in words[1:]])  # or exits
    for words in whole + parts:
        if words[:1] == ["skv"] and words[1] != "COMMAND":
            options = subparsers[words[1]]._option_string_actions
            named = {word for word in words if word.startswith("--")}
            assert named <= set(options), words
        elif words[:1] == ["python"] and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), words
        elif words[:1] == ["make"]:
            assert words[1] in targets, words


@EACH
def test_listings_are_python(page: Path) -> None:
    for block in listings(page, "python"):
        compile(block, str(page), "exec")


def test_the_policy_shown_is_that_of_the_example() -> None:
    example = (ROOT / "examples" / "new_policy.py").read_text(encoding="utf-8")
    shown = [x for x in listings(DOCS / "retention.md", "python") if "(Policy)" in x]
    assert len(shown) == 1
    assert shown[0] in example


def test_every_example_is_listed_and_short() -> None:
    start = (DOCS / "index.md").read_text(encoding="utf-8")
    for file in (ROOT / "examples").iterdir():
        if file.suffix in (".py", ".ipynb"):
            assert f"| `{file.name}` |" in start, file.name
        if file.suffix == ".py":
            assert len(file.read_text(encoding="utf-8").splitlines()) < 60, file.name
