"""Before, report, after: numbered files, and what tlparse shows."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch._logging import trace_structured
from torch.fx import GraphModule

from ..config import Config
from ..errors import ConfigError, shown
from ..report import GraphReport, Report
from .script import CannotRebuild, script

log = logging.getLogger(__name__)

_BEFORE = (
    '# Graph {n} as Dynamo gave it to the backend "skv". To be read; {n}_repro.py rebuilds it.\n'
)
_AFTER = "# Graph {n} as the pass left it, before Inductor. To be read, not to be run.\n"


def check_folder(value: Any) -> Path:
    """The folder that ``dump`` names, made if it is not there.

    Raises:
        ConfigError: it is no folder, or one that cannot be written.
    """
    advice = "give a folder that can be written, or leave dump out."
    try:
        name = os.fspath(value)
        if not name:
            raise ValueError
        folder = Path(os.path.abspath(os.path.expanduser(name)))
        folder.mkdir(parents=True, exist_ok=True)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"dump={shown(value)}: expected the name of a folder.") from error
    except OSError as error:
        raise ConfigError(f"dump={shown(value)}: {error.strerror or error}; {advice}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"dump={shown(value)}: the folder cannot be written; {advice}")
    return folder


class Trail:
    """Of one graph. ``folder``: where its files go, None for no files.

    In a folder: ``NNN_before.py``, ``NNN_repro.py``, ``NNN_report.json`` and ``NNN_after.py``. In
    the trace (``TORCH_TRACE=DIR``): ``skv_graph_before``, ``skv_report`` and ``skv_graph_after``.
    Each is written as soon as it is known, so that a graph that fails leaves what came before.

    Raises (every method):
        ConfigError: a file cannot be written.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._number = ""

    def before(self, gm: GraphModule, inputs: Sequence[Any], config: Config) -> None:
        """The graph from Dynamo. ``config``: of the backend."""
        _artifact("skv_graph_before", "string", lambda: readable(gm))
        if self._folder is None:
            return
        self._number = _claim(self._folder)
        self._write("before.py", _BEFORE.format(n=self._number) + readable(gm))
        try:
            text = script(gm, inputs, config, f"{self._number}_repro.py")
        except CannotRebuild as error:
            log.warning("graph %s in %s has no repro: %s.", self._number, self._folder, error)
            return
        self._write("repro.py", text)

    def report(self, graph: GraphReport, config: Config) -> None:
        """What the pass decided about it."""

        def text() -> str:
            return Report((graph,), asdict(config)).to_json() + "\n"

        _artifact("skv_report", "json", text)
        if self._folder is not None:
            self._write("report.json", text())

    def after(self, gm: GraphModule) -> None:
        """The graph that is compiled in its place."""
        _artifact("skv_graph_after", "string", lambda: readable(gm))
        if self._folder is not None:
            self._write("after.py", _AFTER.format(n=self._number) + readable(gm))

    def _write(self, name: str, text: str) -> None:
        assert self._folder is not None
        try:
            (self._folder / f"{self._number}_{name}").write_text(text, encoding="utf-8")
        except OSError as error:
            raise _lost(self._folder, error) from error


def readable(gm: GraphModule) -> str:
    """A graph as Python, with shapes, dtypes and source lines."""
    text = gm.print_readable(print_output=False, include_stride=True, include_device=True)
    return text.strip() + "\n"


def _claim(folder: Path) -> str:
    """The next number that nobody has in a folder, such as "007"; other processes may write there
    too."""
    try:
        names = [re.match(r"(\d{3,})_", name) for name in os.listdir(folder)]
        number = max((int(found[1]) for found in names if found), default=-1) + 1
        while True:
            try:
                (folder / f"{number:03d}_before.py").touch(exist_ok=False)
                return f"{number:03d}"
            except FileExistsError:
                number += 1
    except OSError as error:
        raise _lost(folder, error) from error


def _lost(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"dump={str(folder)!r}: a file could not be written there ({error}).")


def _artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": encoding},
        payload_fn=payload,
    )
