"""Which implementation of ``attend`` a forward gets, and why.

Decided here and nowhere else: the ops ask when they run, reports ask before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from . import kernels
from .cpu import kernels as cpu
from .cpu import library
from .layout import Layout

REFERENCE = "PyTorch reference"


class Choice(NamedTuple):
    """``kernel``: such as "Triton", "native avx2" or "PyTorch reference"."""

    kernel: str
    why: str


def refusal(
    layout: Layout,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    heads: int,
    causal: bool,
    begins: Callable[[], bool],
) -> str | None:
    """Why a forward runs on the reference, None where it runs on kernels.

    Args:
        heads: query heads that the cache was made for.
        begins: whether the forward begins a sequence; asked of several tokens only, and as late as
            can be where the answer waits for a device.
    """
    if q.is_cuda:
        reason = kernels.refusal(layout, q, mask, q.shape[1] // k.shape[1], heads)
        if reason is None and q.shape[2] > 1 and (causal or begins()):
            return kernels.FIRST
        return reason
    if q.device.type != "cpu":
        return f"there are no kernels for {q.device.type}"
    if q.shape[2] > 1 and (causal or begins()):
        return kernels.FIRST
    return cpu.refusal(layout, q, mask, k.shape[1])


def choose(
    layout: Layout, q: Tensor, k: Tensor, mask: Tensor | None, heads: int, causal: bool
) -> Choice:
    """The choice for a forward that is yet to come; of its tensors only shape, dtype and device
    are looked at. Arguments as in :func:`refusal`."""
    reason = refusal(layout, q, k, mask, heads, causal, lambda: False)
    if reason is not None:
        return Choice(REFERENCE, reason)
    tokens, rows = q.shape[2], q.shape[1] // k.shape[1] * q.shape[2]
    if q.is_cuda:
        kernel, why = "Triton", f"query rows of a kv head: {rows} of at most {kernels.MOST_ROWS}"
    else:
        kernel, why = f"native {library.variant()}", library.why()
    if tokens > 1:
        why += f"; on the {REFERENCE}: {kernels.FIRST}"
    return Choice(kernel, why)
