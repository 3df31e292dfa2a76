"""The registry of retention policies, which the tests, the command line and the docs iterate."""

from __future__ import annotations

from typing import Any

from ..table import check_shape, load_table
from .base import Policy
from .h2o import H2O
from .keep import KeepAll
from .prefix import PrefixKV
from .rdr import RDR
from .retrieval import Retrieval
from .snapkv import SnapKV
from .streaming import Streaming
from .window import WindowKV

#: By the name in ``Config(retention=...)``.
POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (RDR, KeepAll, Streaming, SnapKV, H2O, WindowKV, PrefixKV, Retrieval)
}


def make_policy(config: Any, layers: int | None = None, heads: int | None = None) -> Policy | None:
    """The policy of a ``Config``; None where every token stays.

    ``layers`` and kv ``heads``: of the pool, so that a table of another model is refused now
    rather than when the first tokens leave the window.

    Raises:
        ConfigError: the table of retrieval heads cannot be read, or is another model's.
    """
    kind = POLICIES[config.retention]
    if issubclass(kind, Retrieval):
        table = load_table(config.retention_table)
        if layers is not None and heads is not None:
            check_shape(table, layers, heads)
        return kind(table=table)
    return kind() if kind.tracked else None
