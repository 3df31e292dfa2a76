"""``skv completion``: a script that lets a shell complete ``skv`` commands with Tab."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from skv_compile.commands import common
from skv_compile.commands.screen import Screen

HELP = "print a script that completes skv commands with Tab, for bash, zsh or fish"

SHELLS = ("bash", "zsh", "fish")
WHERE = {
    "bash": 'eval "$(skv completion bash)"    in ~/.bashrc',
    "zsh": "skv completion zsh > FOLDER/_skv    with a FOLDER of $fpath, before compinit",
    "fish": "skv completion fish > ~/.config/fish/completions/skv.fish",
}

#: What stands for a file in ``--help``: these are completed with names of files.
FILES = {"FILE", "F", "PATH", "M", "MODEL"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The shell."""
    parser.add_argument("shell", choices=SHELLS, help="the shell to complete in")
    parser.epilog = "use it: " + "; ".join(WHERE.values())


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Print the script; where it belongs goes to standard error if that is a terminal."""
    text = script(args.shell)
    screen.write(text.rstrip("\n"))
    if screen.live:
        screen.note(f"\nUse it: {WHERE[args.shell]}")
    return {"shell": args.shell, "script": text}


def script(shell: str) -> str:
    """The script for one of :data:`SHELLS`.

    Raises:
        UsageError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise common.UsageError(
            "shell completion is written by shtab, which is not installed; run: pip install shtab"
        ) from error
    from skv_compile.cli import build_parser
    from skv_compile.config import CODECS
    from skv_compile.retention.policies import POLICIES

    words = {"codec": CODECS, "retention": tuple(POLICIES)}
    parser = build_parser()
    for action in _actions(parser):
        if action.dest in words:
            action.choices = words[action.dest]
        elif action.metavar in FILES:
            # shtab reads this attribute, which argparse does not know.
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(parser, shell=shell)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every argument of a parser and of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from _actions(sub)
        else:
            yield action
