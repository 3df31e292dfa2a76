"""A dense cache tensor that takes no memory.

It has the shape, dtype and strides-of-some-view of the dense cache that a model's
code expects, over a single NaN: tracing sees a cache, a stray read is poisoned, and
most eager in-place writes raise (an indexed assignment with a tensor only warns: a
module whose buffers have become phantoms is to be run compiled). The layer's real
state rides on it as an attribute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .state import LayerState

_ATTRIBUTE = "_skv_state"


def make(state: LayerState) -> Tensor:
    """A phantom [B, H, S, D] that stands for ``state``."""
    nan = torch.full((1,), torch.nan, dtype=state.dtype, device=state.device)
    phantom = nan.expand(state.batch, state.heads, state.layout.max_tokens, state.layout.head_dim)
    attach(phantom, state)
    # One compile per length: a symbolic length would let one graph serve another cache's pages.
    for dim in range(4):
        torch._dynamo.mark_static(phantom, dim)
    return phantom


def attach(tensor: Tensor, state: LayerState) -> None:
    """Let ``state`` ride on ``tensor``."""
    setattr(tensor, _ATTRIBUTE, state)


def state_of(tensor: object) -> LayerState | None:
    """The state that rides on a tensor, if it is a phantom."""
    return getattr(tensor, _ATTRIBUTE, None)


def leave(tensor: Tensor, data: Tensor) -> None:
    """Make a vacated buffer dense again, over ``data``."""
    tensor.data = data
    delattr(tensor, _ATTRIBUTE)


def vacate(dense: Tensor, state: LayerState, sliced: bool) -> None:
    """Turn a dense cache buffer into a phantom in place; its memory is freed.

    Every reference to the tensor object sees the phantom. ``sliced``: the model writes slices of
    it. Dynamo traces those writes only into a tensor whose strides are not zero.
    """
    shape = dense.shape
    if sliced:
        nan = dense.new_full((sum(shape) - len(shape) + 1,), torch.nan)
        dense.data = nan.as_strided(shape, [1] * len(shape))
    else:
        dense.data = dense.new_full((1,), torch.nan).expand(shape)
    attach(dense, state)
