"""Which slots of a cache an index selects; shared by the spellings of a cache write."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .indexing import entries, is_full, is_prefix
from .nodes import known, tensor

_INDEX_TYPES = (torch.int64, torch.int32)


def slot_entry(index: Any, cache: Node) -> Any:
    """The entry for the slots in `cache[index]`, None unless the slots are all it selects.

    A prefix of the batch counts as all of it: the new keys then have fewer rows than the cache,
    which is refused later with a reason that says so.
    """
    fake = tensor(cache)
    if fake is None or fake.dim() != 4:
        return None
    spelled = entries(index, 4)
    if len(spelled) != 4 or any(entry is None for entry in spelled):
        return None
    batch, head, slot, dim = spelled
    if not is_prefix(batch) or not is_full(head, fake.shape[1]) or not is_full(dim, fake.shape[3]):
        return None
    return slot


def is_slot_index(index: Any, source: Any) -> bool:
    """True for an integer tensor with one slot for each of the new tokens.

    Two sizes that nothing relates may be equal; if they are not, the write itself fails.
    """
    slots, new = tensor(index), tensor(source)
    if slots is None or new is None or slots.dim() != 1 or new.dim() != 4:
        return False
    return slots.dtype in _INDEX_TYPES and not known(slots.shape[0] != new.shape[2])
