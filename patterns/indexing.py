"""Reading `tensor[index]`: one entry per axis, whatever the spelling."""

from __future__ import annotations

from typing import Any

from .nodes import Int, integer, known


def entries(index: Any, rank: int) -> list[Any]:
    """Spell an index out: `[..., p, :]` and `[:, :, p]` of a 4-D tensor are both
    `[:, :, p, :]`. Entries that are None insert an axis and count for no axis of the tensor.
    """
    given = list(index) if isinstance(index, tuple | list) else [index]
    missing = rank - sum(entry is not None and entry is not Ellipsis for entry in given)
    # `in` and `.index` would compare nodes and slices by value; identity is what is meant.
    at = next((i for i, entry in enumerate(given) if entry is Ellipsis), None)
    if at is None:
        return given + [slice(None)] * missing
    return given[:at] + [slice(None)] * missing + given[at + 1 :]


def is_full(entry: Any, size: Int) -> bool:
    """True for `:` and for slices that are known to select the whole axis."""
    if not is_prefix(entry):
        return False
    stop = integer(entry.stop)
    return entry.stop is None or (stop is not None and known(stop >= size))


def is_prefix(entry: Any) -> bool:
    """True for `:` and `:end`."""
    return is_step_one(entry) and (entry.start is None or integer(entry.start) == 0)


def is_step_one(entry: Any) -> bool:
    """True for a slice with no step, or a step of one."""
    return isinstance(entry, slice) and (entry.step is None or integer(entry.step) == 1)
