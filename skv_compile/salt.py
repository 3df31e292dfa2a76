"""Our pass in Inductor, which also keeps its caches from serving code of another version of us."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from .config import Config
from .order import write_last


@lru_cache(maxsize=1)
def source_hash() -> str:
    """A hash over every source file that decides what code a graph becomes."""
    root = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for package in ("lowering", "lowering/reference", "patterns", "codec", "."):
        for path in sorted((root / package).glob("*.py")) + sorted(
            (root / package).glob("templates/*")
        ):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class Salted(CustomGraphPass):
    """Runs the pass that was there before, if any, puts writes of caches last, and adds our source
    and config to the key."""

    def __init__(self, config: Config, before: Any = None) -> None:
        self._config = repr(config)
        self._before = before

    def __call__(self, graph: torch.fx.Graph) -> None:
        if self._before is not None:
            self._before(graph)
        write_last(graph)

    def uuid(self) -> Any:
        """None, which turns caching off, where the other pass cannot be identified."""
        if self._before is None:
            return ("skv", source_hash(), self._config)
        if not isinstance(self._before, CustomGraphPass):
            return None
        other = self._before.uuid()
        return None if other is None else ("skv", source_hash(), self._config, other)


def config_patches(config: Config) -> dict[str, Any]:
    """Inductor settings for one compile: our salt, after whatever hook is already set."""
    from torch._inductor import config as inductor

    hook = inductor.post_grad_custom_pre_pass
    if isinstance(hook, (list, tuple)):
        return {"post_grad_custom_pre_pass": [*hook, Salted(config)]}
    return {"post_grad_custom_pre_pass": Salted(config, hook)}
