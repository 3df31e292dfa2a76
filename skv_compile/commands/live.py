"""Streaming text beside a picture of the cache, drawn again and again while tokens come."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import TextStreamer

from skv_compile.commands.common import WARM_UP_STEPS, TokenTimer
from skv_compile.commands.picture import GREY, clean, picture
from skv_compile.errors import CacheStateError

if TYPE_CHECKING:
    from skv_compile.cache.spherical import SphericalCache
    from skv_compile.chat import Stop
    from skv_compile.look import Look

#: Columns of the picture at most, and of a terminal that has room for the text beside it.
PICTURE, BOTH = 68, 90
#: Looking at the cache may take this part of the time; and this many seconds are between two looks.
PART, LEAST = 0.05, 0.5
PER_SECOND = 8


class Words(TextStreamer):
    """Collects the text of an answer, whole words at a time."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with more of the text."""
        self.text += text


class View:
    """What is on the terminal during an answer. ``seen``: the last look at the cache."""

    def __init__(self, console: Console, cache: SphericalCache) -> None:
        self.console, self.cache = console, cache
        self.seen: Look | None = None
        self._words: Words | None = None
        self._timer = TokenTimer()
        self._stop: Stop | None = None
        self._compiles = self._done = False
        self._began = self._next = 0.0

    # ------------------------------------------------------------ told by the chat

    def begin(self, words: Words, timer: TokenTimer, stop: Stop, compiles: bool) -> None:
        """An answer begins; ``compiles``: its second token waits for the compiler."""
        self._words, self._timer, self._stop = words, timer, stop
        self._compiles, self._done = compiles, False
        self._began, self._next = time.perf_counter(), 0.0

    def tick(self) -> None:
        """A token has come: look at the cache, if that is due."""
        now = time.perf_counter()
        if now >= self._next:
            self.look()
            cost = time.perf_counter() - now
            self._next = now + max(LEAST, cost / PART)

    def end(self) -> None:
        """The answer is complete."""
        self.look()
        self._done = True

    def look(self) -> None:
        """Look at the cache now."""
        from skv_compile.look import look_at

        with contextlib.suppress(CacheStateError):
            self.seen = look_at(self.cache)

    def forget(self) -> None:
        """The cache is empty again."""
        self.seen = None

    # ------------------------------------------------------------ on the terminal

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Draw while the block runs; what is drawn last stays."""
        live = Live(get_renderable=self._draw, console=self.console, refresh_per_second=PER_SECOND)
        with live:
            try:
                yield
            finally:
                self._done = True

    def picture(self, width: int, speed: float | None = None) -> RenderableType:
        """The picture, or why there is none."""
        if self.seen is None:
            return Text("The cache has not seen a token yet.", GREY)
        return picture(self.seen, min(width, PICTURE), speed)

    def _draw(self) -> RenderableType:
        width, height = self.console.size
        if width < BOTH:
            below = self.picture(width, self._speed())
            lines = len(self.console.render_lines(below, pad=False))
            return Group(self._text(width, height - 2 - lines), Text(), below)
        own = min(PICTURE, width // 2)
        both = Table.grid(padding=(0, 2, 0, 0), expand=True)
        both.add_column(ratio=1)
        both.add_column(width=own)
        text = self._text(width - own - 4, height - 2)
        both.add_row(text, self.picture(own, self._speed()))
        return both

    def _text(self, width: int, height: int) -> Text:
        """The answer as far as it has come: all of it when it is complete, else its end."""
        words = clean(self._words.text) if self._words else ""
        if self._done:
            return Text(words.strip())
        status = Text(self._status(), GREY)
        lines = Text(words.lstrip()).wrap(self.console, max(1, width))
        shown = lines[-max(1, height - 1) :] if words.strip() else []
        return Text("\n").join([*shown, status])

    def _status(self) -> str:
        """What is being waited for."""
        seconds = f"{time.perf_counter() - self._began:.0f} s"
        if self._stop is not None and self._stop.asked:
            return f"stopping after this token; Ctrl-C again stops at once  {seconds}"
        came = len(self._timer.times)
        if came < 2:
            return f"reading  {seconds}"
        if came == 2 and self._compiles:
            return f"compiling the decoding step, once  {seconds}"
        return seconds

    def _speed(self) -> float | None:
        left_out = WARM_UP_STEPS if self._compiles else 0
        return self._timer.speed(left_out)["tokens_per_second"]


__all__ = ["View", "Words"]
