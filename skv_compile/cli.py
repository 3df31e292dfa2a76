"""The ``skv`` command.

Exit codes: 0 done, 1 the answer is no (``doctor``) or an unexpected failure, 2 something the
user can mend, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from skv_compile.commands import COMMANDS

#: torch's error where it finds no C++ compiler; others contain its name.
NO_COMPILER = "InvalidCxxCompiler"

START = """\
start here:
  skv doctor             what will work on this machine
  skv chat               talk to a small model and watch its cache
  skv demo               the same model with a dense and a compressed cache, in numbers
  skv COMMAND --help     what a command takes
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser with one sub-parser per module of ``skv_compile.commands``."""
    parser = argparse.ArgumentParser(
        prog="skv",
        description="Compress the KV cache of an unmodified model.",
        epilog=START,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the versions and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"skv_compile.commands.{name}")
        sub = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(sub)
        sub.add_argument("--json", metavar="FILE", help="also write the result to FILE as JSON")
        sub.add_argument("--debug", action="store_true", help="show tracebacks of errors")
        sub.set_defaults(module=module)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    if not argv:
        parser.print_help()
        return 0
    args = parser.parse_args(argv)
    try:
        return _run(args, argv)
    except KeyboardInterrupt:
        if args.debug:
            raise
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone (skv ... | head): nothing to say, nor at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            raise
        return _explain_error(error)


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    from skv_compile.commands import common
    from skv_compile.commands.screen import Screen

    if args.json:
        common.check_writable(args.json)
    result: dict[str, Any] = args.module.run(args, Screen())
    code = int(result.pop("exit_code", 0))
    if args.json:
        common.write_json(args.json, shlex.join(["skv", *argv]), result)
    return code


def _explain_error(error: Exception) -> int:
    from skv_compile.errors import SkvError

    if isinstance(error, SkvError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    kind = type(error).__name__
    if NO_COMPILER in f"{kind}: {error}":
        print(
            "error: compiled code for a CPU needs a C++ compiler, and none works here. Install g++ "
            "or clang++ (Debian: apt install g++), or set CXX; skv doctor looks for one.",
            file=sys.stderr,
        )
        return 2
    print(f"error: {kind}: {error}", file=sys.stderr)
    if kind == "OutOfMemoryError":
        print("The model does not fit; try a smaller one or fewer tokens.", file=sys.stderr)
        return 2
    print("This was not expected; run again with --debug for the traceback.", file=sys.stderr)
    return 1


class _Version(argparse.Action):
    """``--version``, without importing torch."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        from skv_compile.commands.common import versions

        print(" ".join(f"{name} {version}" for name, version in versions().items() if version))
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
