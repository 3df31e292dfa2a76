"""``python -m skv_compile chat`` in a real terminal: a pseudo-terminal that is typed into."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import TEMPLATE, saved, tiny

pty = pytest.importorskip("pty")
import fcntl  # noqa: E402  (there is none where there is no pty)
import struct  # noqa: E402
import termios  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CONTROL_C, CONTROL_D = "\x03", "\x04"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]|\x1b[=>]")
PROMPT = "\n> "


class Terminal:
    """A program and the terminal it runs in."""

    def __init__(self, *command: str) -> None:
        self.own, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        self.program = subprocess.Popen(
            command,
            stdin=other,
            stdout=other,
            stderr=other,
            cwd=ROOT,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # Ctrl-C becomes SIGINT
            env={**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"},
        )
        os.close(other)
        self.raw = ""

    def wait_for(self, *words: str, seconds: float = 180) -> str:
        """What is shown, without escape codes, from now until all of ``words`` have been."""
        seen, end = "", time.monotonic() + seconds
        while not all(word in seen for word in words):
            left = end - time.monotonic()
            assert left > 0, f"no {words} in {seen[-3000:]!r}"
            if select.select([self.own], [], [], min(left, 1.0))[0]:
                try:
                    part = os.read(self.own, 65536).decode(errors="replace")
                except OSError:
                    raise AssertionError(f"it ended without {words}: {seen[-3000:]}") from None
                self.raw += part
                seen = ESCAPES.sub("", seen + part).replace("\r\n", "\n").replace("\r", "\n")
        return seen

    def type(self, text: str) -> None:
        """Type, a moment after what is on the screen, as hands do."""
        time.sleep(0.3)
        os.write(self.own, text.encode())

    def close(self) -> None:
        if self.program.poll() is None:
            self.program.kill()
        self.program.wait()
        os.close(self.own)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    folder = saved(tmp_path / "tiny", tiny("llama"), TEMPLATE)
    sizes = ["--context", "4000", "--max-new-tokens", "300", "--bits", "2.5"]
    command = [sys.executable, "-m", "skv_compile", "chat", folder, *sizes]
    shown = Terminal(*command, "--json", str(tmp_path / "chat.json"))
    yield shown
    shown.close()


@pytest.mark.slow
def test_a_chat_goes_on_after_an_answer_was_stopped(terminal: Terminal, tmp_path: Path) -> None:
    terminal.wait_for(PROMPT)
    terminal.type("hello there\n")
    said = terminal.wait_for("tokens a second", "of 4,000 in the cache", PROMPT)
    assert "kv head (down)" in said  # the picture
    assert "\x1b[" in terminal.raw
    terminal.type("and you?\n")
    terminal.wait_for("kept,", "tokens a second")
    terminal.type(CONTROL_C)
    terminal.wait_for("Stopped. The conversation goes on", PROMPT, seconds=30)
    terminal.type(CONTROL_C)  # of no answer
    terminal.wait_for("/quit leaves", PROMPT, seconds=30)
    terminal.type("so?\n")
    terminal.wait_for("of 4,000 in the cache", PROMPT)
    terminal.type(CONTROL_D)
    assert terminal.program.wait(timeout=60) == 0

    found = json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))
    one, two, three = found["turns"]
    assert [x["finish"] for x in found["turns"]] == ["length", "stopped", "length"]
    assert (one["answer_tokens"], three["answer_tokens"]) == (300, 300)
    assert 0 < two["answer_tokens"] < 300
    cached = one["cache"]["tokens"]
    assert cached == len("<Uhello there><A") + 299
    assert two["new_tokens"] == 1 + len("><Uand you?><A")
    cached += two["new_tokens"] + two["answer_tokens"] - 1
    assert two["cache"]["tokens"] == cached
    assert three["cache"]["tokens"] == cached + three["new_tokens"] + 299
    assert f"{three['cache']['resident_bytes']:,} bytes" in terminal.raw
