"""Calls of public doors: counted, and refused only in the project's own words."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from skv_compile.errors import SkvError

#: How many examples a test tries: more with SKV_EXAMPLES=2000.
EXAMPLES = int(os.environ.get("SKV_EXAMPLES", "0"))

#: Calls made by each test file; ``conftest`` writes them to the file SKV_FUZZ_COUNT names.
CALLS: Counter[str] = Counter()

#: Every refusal has one of these: what was expected, or what to do instead.
REMEDY = re.compile(
    r"expected|Known: |[Mm]ake |Leave |Ask for|Raise |Lower |[Uu]se |Call |call |Run |run |Set |"
    r"Load |Remove |[Tt]ry |Give |give |Pass |load "
)


class Refused:
    """What :func:`attempt` returns for a call that was refused."""

    def __init__(self, error: Exception) -> None:
        self.error, self.text = error, str(error)

    def __repr__(self) -> str:
        return f"Refused({self.error!r})"


def attempt(
    where: str,
    function: Callable[..., Any],
    *args: Any,
    also: tuple[type[Exception], ...] = (),
    **kwargs: Any,
) -> Any:
    """Call and count; an error of the project's becomes a :class:`Refused`, any other escapes.

    Args:
        where: the test file, for the count.
        also: kinds of error that the door's documentation names beside the project's.
    """
    CALLS[where] += 1
    try:
        return function(*args, **kwargs)
    except (SkvError, *also) as error:
        refused = Refused(error)
    if isinstance(refused.error, SkvError):
        assert REMEDY.search(refused.text), f"no remedy in {refused}"
    return refused
