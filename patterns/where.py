"""Where in the model's source a node comes from."""

from __future__ import annotations

import re
from pathlib import Path

from torch.fx import Node

_FRAME = re.compile(r'File "(?P<file>.+)", line (?P<line>\d+), in (?P<function>.+)')
# Frames every model goes through on its way to SDPA say nothing about which attention it is.
_PLUMBING = ("torch/", "transformers/integrations/")


def where(node: Node) -> str:
    """The innermost frame of the model's own code, as "package/file.py:123 in forward"."""
    frames = [
        (_relative(frame["file"]), frame["line"], frame["function"])
        for frame in _FRAME.finditer(node.meta.get("stack_trace") or "")
    ]
    if not frames:
        return ""
    own = [frame for frame in frames if not frame[0].startswith(_PLUMBING)]
    file, line, function = (own or frames)[-1]
    return f"{file}:{line} in {function}"


def _relative(file: str) -> str:
    """The file's name from its top-level package on: a report must not depend on the machine."""
    path = Path(file)
    for marker in ("site-packages", "dist-packages"):
        if marker in path.parts:
            last = len(path.parts) - 1 - path.parts[::-1].index(marker)
            return "/".join(path.parts[last + 1 :])
    root = path.parent
    while (root / "__init__.py").is_file() and root != root.parent:
        root = root.parent
    return path.relative_to(root).as_posix()
