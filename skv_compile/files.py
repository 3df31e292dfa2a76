"""Where files are kept, and how they are written: whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

#: Overrides the folder that models and generated code are kept in.
CACHE_VARIABLE = "SKV_CACHE_DIR"


def cache_folder() -> Path:
    """The folder for models and generated code (``SKV_CACHE_DIR`` overrides it)."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(os.path.expanduser(chosen))  # Path.expanduser raises for ~nobody
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(base)) / "skv_compile"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[str]:
    """Name of a temporary file beside ``path`` that takes its place when the block ends well.

    Raises:
        OSError: the folder cannot be written to. What stood at ``path`` stays.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
