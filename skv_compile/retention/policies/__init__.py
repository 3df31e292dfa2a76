"""The registry of retention policies, which the tests, the command line and the docs iterate."""

from __future__ import annotations

from typing import Any

from .base import Policy
from .keep import KeepAll
from .rdr import RDR

#: By the name in ``Config(retention=...)``.
POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (RDR, KeepAll)}


def make_policy(config: Any) -> Policy | None:
    """The policy of a ``Config``; None where every token stays."""
    kind = POLICIES[config.retention]
    return kind() if kind.tracked else None
