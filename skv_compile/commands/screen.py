"""What a command shows: live progress on a terminal, plain lines everywhere else.

Results go to standard output, progress to standard error, so a redirected result is clean.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed
from rich.progress import TimeRemainingColumn as Remaining


class Screen:
    """Output of one command."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty() and sys.stderr.isatty()
        # Without a terminal rich would wrap tables at 80 columns.
        self.out = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
        self._err = Console(stderr=True, highlight=False)

    def print(self, thing: Any) -> None:
        """Print a rich object, such as a table."""
        self.out.print(thing)

    def write(self, text: str) -> None:
        """Print text exactly, without wrapping or styling."""
        print(text, flush=True)

    def note(self, text: str) -> None:
        """Say something about the work, beside the result."""
        self._line(text)

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[Callable[[str], None]]:
        """A step of unknown length; call what it yields to say what is being done now."""
        with self._progress(title, None) as (update, _):
            yield update

    @contextlib.contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        """A step of ``total`` parts; call what it yields after each part."""
        with self._progress(title, total) as (_, advance):
            yield advance

    @contextlib.contextmanager
    def _progress(
        self, title: str, total: int | None
    ) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
        start = time.perf_counter()
        if not self.live:
            self._line(f"{title} ...")
            yield (lambda text: self._line(f"{title}: {text}")), (lambda: None)
        else:
            columns: list[Any] = [SpinnerColumn(), TextColumn("{task.description}")]
            if total:
                columns += [BarColumn(), MofNCompleteColumn(), Remaining(), TextColumn("left,")]
            columns += [Elapsed(), TextColumn("so far")]
            with Progress(*columns, console=self._err, transient=True) as progress:
                task = progress.add_task(title, total=total)
                yield (
                    (lambda text: progress.update(task, description=f"{title}: {text}")),
                    (lambda: progress.advance(task)),
                )
        self._line(f"{title}: done in {time.perf_counter() - start:.1f} s")

    def _line(self, text: str) -> None:
        self._err.print(text, markup=False, soft_wrap=True)
