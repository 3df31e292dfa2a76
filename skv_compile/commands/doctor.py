"""``skv doctor``: what is installed, and what will work here."""

from __future__ import annotations

import argparse
from typing import Any

from skv_compile.commands.screen import Screen

HELP = "show versions, device and compiler, and what will work on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing beyond the common arguments."""


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Print the table; exit code 1 when something essential is missing."""
    from skv_compile import doctor

    with screen.step("Looking around"):
        rows = doctor.collect()
    screen.print(doctor.table(rows))
    broken = [row.name for row in rows if row.status == "missing"]
    return {"rows": [row.to_dict() for row in rows], "exit_code": int(bool(broken))}
