"""Write docs/configuration.md and docs/commands.md from the code they describe.

python docs/generate.py [--check]
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from skv_compile import cli, config, errors  # noqa: E402
from skv_compile.backend import BACKEND_OPTIONS  # noqa: E402
from skv_compile.files import CACHE_VARIABLE  # noqa: E402
from skv_compile.lowering import kernels  # noqa: E402
from skv_compile.lowering.cpu import library  # noqa: E402
from skv_compile.retention.policies import POLICIES  # noqa: E402

NOTE = "<!-- Written by docs/generate.py; change the code it describes instead. -->\n\n"

ENVIRONMENT = {
    CACHE_VARIABLE: "The folder for the demo model, generated GPU kernels, compiled CPU kernels "
    "and what `skv tune` found. Default: `skv_compile` in `$XDG_CACHE_HOME`, or in `~/.cache`.",
    library.SWITCH: "The native CPU kernels: "
    + ", ".join(f"`{name}`" for name in library.VARIANTS)
    + ", or `reference` for the PyTorch reference. Default: the best that this CPU runs.",
    kernels.SWITCH: "`reference` turns the Triton kernels off.",
}

CONFIGURATION = """# Configuration

One frozen dataclass, `skv.Config`, validated when it is made. Any of these gives a setting:

```python
import torch
import skv_compile as skv

skv.compile(model, bits=2.125)  # single settings by name
skv.compile(model, config=skv.Config(bits=2.125, retention="none"))
skv.compile(model, config=skv.Config.preset("balanced"))
torch.compile(model, backend="skv", options={"bits": 2.125})
skv.SphericalCache(model.config, max_cache_len=4096, bits=2.125)
```

`config.replace(bits=1.125)` is a copy with a change. An unknown name, or a value out of range,
raises `skv.ConfigError` with the nearest name or the range.

"""


def configuration() -> str:
    """Settings, presets, policies, options of the backend, environment, errors."""
    parts = [NOTE, CONFIGURATION, "## Settings\n\n"]
    rows = [
        (
            f"`{f.name}`",
            f.type.replace(" | ", " or "),
            _default(f.name, f.default),
            _cell(f.metadata["doc"]),
        )
        for f in dataclasses.fields(config.Config)
    ]
    parts.append(_table(("setting", "type", "default", "meaning"), rows))
    parts.append("\n## Presets\n\n`skv.Config.preset(NAME)`:\n\n")
    presets = [
        (f"`{name}`", ", ".join(f"`{key}={value!r}`" for key, value in settings.items()))
        for name, settings in config.PRESETS.items()
    ]
    parts.append(_table(("preset", "settings"), presets))
    parts.append("\n## Policies\n\n`retention=NAME`; [Retention](retention.md) compares them.\n\n")
    policies = [(f"`{name}`", _summary(kind)) for name, kind in POLICIES.items()]
    parts.append(_table(("policy", "what it does"), policies))
    dims = ", ".join(map(str, config.HEAD_DIMS))
    parts.append(f"\n## Head dims\n\n{dims}. Others are refused with `skv.UnsupportedError`.\n")
    parts.append(
        '\n## Options of the backend\n\nIn `options=` of `torch.compile(..., backend="skv")`, '
        "beside the settings above:\n\n"
    )
    options = [(f"`{name}`", _cell(text)) for name, text in BACKEND_OPTIONS.items()]
    parts.append(_table(("option", "meaning"), options))
    parts.append("\n## Environment\n\n")
    parts.append(_table(("variable", "meaning"), [(f"`{k}`", v) for k, v in ENVIRONMENT.items()]))
    parts.append("\n## Errors\n\nAll derive from `skv.SkvError`.\n\n")
    raised = [getattr(errors, name) for name in errors.__all__ if name[0].isupper()]
    found = [
        (f"`{e.__name__}`", _summary(e)) for e in raised if e.__name__ != errors.SkvError.__name__
    ]
    parts.append(_table(("error", "meaning"), found))
    return "".join(parts)


def commands() -> str:
    """Every command of ``skv`` with its options."""
    parts = [
        NOTE,
        "# Commands\n\n`skv COMMAND`, or `python -m skv_compile COMMAND`. Exit code 0: done; 1: "
        "the answer is no, or an unexpected failure; 2: something you can mend; 130: "
        "interrupted.\n",
    ]
    parser = cli.build_parser()
    for name, sub in _subparsers(parser).items():
        parts.append(f"\n## skv {name}\n\n{_sentence(sub.description or '')}\n\n")
        rows = []
        for action in sub._actions:  # argparse has no public list of them
            if isinstance(action, argparse._HelpAction):
                continue
            parsed = ", ".join(f"`{x}`" for x in action.option_strings) or f"`{action.metavar}`"
            taken = ""
            if action.option_strings and action.nargs != 0:
                values = action.choices or [action.metavar or action.dest.upper()]
                taken = ", ".join(f"`{x}`" for x in values)
            rows.append((parsed, taken, _cell(action.help or "")))
        parts.append(_table(("option", "value", "meaning"), rows))
    return "".join(parts)


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("skv has no commands")


def _default(name: str, value: object) -> str:
    if name == "retention":  # depends on the codec
        return "see meaning"
    return "" if value is None else f"`{value!r}`"


def _summary(kind: type) -> str:
    """The first paragraph of a docstring, without a paper's title."""
    paragraphs = [_cell(x) for x in inspect.cleandoc(kind.__doc__ or "").split("\n\n")]
    paper = getattr(kind, "paper", "")
    title = paper.split(" (")[0].split(":")[0]
    if title and paragraphs[0].startswith(title):
        module = inspect.getdoc(sys.modules[kind.__module__]) or ""
        return f"{module.splitlines()[0]} After {paragraphs[0]}"
    return paragraphs[0]


def _sentence(text: str) -> str:
    return _cell(text[:1].upper() + text[1:] + ("" if text.endswith(".") else "."))


def _cell(text: str) -> str:
    """Text as one line of a table: quotes of reStructuredText are those of Markdown."""
    text = " ".join(text.split()).replace("``", "`").replace("|", "\\|")
    return text.replace("%%", "%").replace("<", "&lt;")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": configuration,
    "commands.md": commands,
}


def main() -> None:
    wrong = []
    for name, make in PAGES.items():
        file, text = HERE / name, make()
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            wrong.append(name)
            if "--check" not in sys.argv[1:]:
                file.write_text(text, encoding="utf-8")
                print(f"docs/{name}")
    if "--check" in sys.argv[1:] and wrong:
        sys.exit(f"{', '.join(wrong)} are not what the code says: run python docs/generate.py")


if __name__ == "__main__":
    main()
