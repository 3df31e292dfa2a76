"""Every token stays, in one tier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Policy


@dataclass(frozen=True)
class KeepAll(Policy):
    """No retention: the finest tier that ``bits`` pays for, for all tokens alike.

    Its pages hold consecutive tokens and need not say which.
    """

    name: ClassVar[str] = "none"
    tracked: ClassVar[bool] = False
