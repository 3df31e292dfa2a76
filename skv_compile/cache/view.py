"""What ``update()`` returns in eager mode: keys and values that are not there.

A model that calls its cache eagerly (every prefill of ``generate`` does) gets tensor
subclasses of the dense shape. When they arrive at ``scaled_dot_product_attention``, the
queries and the mask are there too, and the attention is computed from the codes. Head
repetition is followed; anything else makes the layer dense for that one call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CacheStateError, UnsupportedError
from ..lowering import reference
from ..retention.arrival import Arrival
from .journal import Journal
from .state import LayerState


class Pending:
    """The tokens of one layer's forward, between ``update()`` and the attention that reads them."""

    def __init__(
        self,
        state: LayerState,
        journal: Journal,
        k: Tensor,
        v: Tensor,
        position: Tensor,
        where: str,
        begins: bool,
        ends: bool,
    ) -> None:
        self.state, self.journal, self.where = state, journal, where
        self.k, self.v, self.position = k, v, position
        self.begins, self.ends = begins, ends  # a sequence; the forward
        self.done = False
        self._dense: tuple[Tensor, Tensor] | None = None

    def attend(self, q: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
        """Attention of ``q`` [B, Hq, T, D] to the cache and the new tokens; stores those."""
        if self.done:
            raise CacheStateError(
                f"{self.where}: its keys were read twice in one forward (do layers share it?). "
                "A compressed layer serves one attention; use a dense cache for this model."
            )
        self._refuse_gradients(q)
        if self.k.shape[2] == 0:  # nothing to store, and nobody to attend
            with self._undoing():
                self.done = True
            return torch.zeros_like(q)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        state, own = self.state, (self.k, self.v, mask, self.position)
        state.check_group(q.shape[1] // state.heads, self.where)
        with torch.no_grad(), self._undoing():
            if self.begins and state.hold(q, *own, scale):
                self.done = True
                out = reference.attend_first(q, *own, causal, scale)
                state.append(*own)
                state.keeper.settle(complete=True)
                return out
            state.keeper.settle()
            frames, arrival = state.begin_calibration(q, *own), state.arrival(*own)
            attend = reference.attend_first if self.begins else state.attend
            out = attend(q, *own, causal, scale)
            frames()
            self._store(mask, q, scale, arrival)
        return out

    def dense(self) -> tuple[Tensor, Tensor]:
        """Dense keys and values of the layer, own tokens exact; the new tokens are stored."""
        if self._dense is None:
            if self.done:
                raise CacheStateError(
                    f"{self.where}: its dense keys were asked for after their attention. "
                    "Use scaled_dot_product_attention, or a dense cache, for this model."
                )
            self._refuse_gradients(self.k)
            with torch.no_grad(), self._undoing():
                k, v = self.state.dense()
                k.index_copy_(2, self.position, self.k)
                v.index_copy_(2, self.position, self.v)
                batch, heads, tokens, dim = self.k.shape
                # Nobody knows who asked: every token is worth the same.
                q = self.k.new_zeros(batch, heads * self.state.group, tokens, dim)
                if tokens:
                    self._store(None, q, 1.0)
                self.done = True
            self._dense = (k, v)
        return self._dense

    def _store(
        self, mask: Tensor | None, q: Tensor, scale: float, arrival: Arrival | None = None
    ) -> None:
        """Store the new tokens."""
        self.done = True
        state = self.state
        state.retain(q, self.k, self.v, mask, self.position, scale, arrival=arrival)
        state.append(self.k, self.v, mask, self.position)

    @contextmanager
    def _undoing(self) -> Iterator[None]:
        """An error undoes the forward, and says which layer it comes from."""
        try:
            yield
            if self.ends:
                self.journal.end()
        except BaseException as error:  # an interruption too
            self.journal.rollback()
            if isinstance(error, Exception):
                error.args = (f"{self.where}: {error}",)
            raise

    def _refuse_gradients(self, q: Tensor) -> None:
        if torch.is_grad_enabled() and (q.requires_grad or self.k.requires_grad):
            self.journal.rollback()
            raise UnsupportedError(
                f"{self.where}: a gradient is required, and codes have none. Call the model under "
                "torch.no_grad() or torch.inference_mode(), or train with a dense cache."
            )


class CachedTensor(torch.Tensor):
    """Keys or values of a :class:`Pending`, of the dense shape and without its memory."""

    _pending: Pending
    _side: int  # 0 keys, 1 values
    _chain: tuple[tuple[Any, tuple, dict], ...]  # views taken so far, to replay on dense data
    _stage: str  # "plain", "grouped" (5-D), "expanded" (5-D), "repeated"
    _end: int | None  # slots up to which the view reaches, when sliced

    @staticmethod
    def make(phantom: Tensor, pending: Pending, side: int) -> CachedTensor:
        return _wrap(phantom, pending, side, (), "plain", None)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _sdpa(*args, **kwargs)
        self = args[0] if args and isinstance(args[0], CachedTensor) else None
        if self is not None:
            view = _follow(self, func, args, kwargs)
            if view is not None:
                return view
        with torch._C.DisableTorchFunctionSubclass():
            if _is_metadata(func):
                return func(*args, **kwargs)
            args, kwargs = torch.utils._pytree.tree_map(_materialise, (args, kwargs))
            return func(*args, **kwargs)


def _wrap(
    phantom: Tensor, pending: Pending, side: int, chain: tuple, stage: str, end: int | None
) -> CachedTensor:
    with torch._C.DisableTorchFunctionSubclass():
        view = phantom.as_subclass(CachedTensor)
    view._pending, view._side, view._chain, view._stage, view._end = (
        pending,
        side,
        chain,
        stage,
        end,
    )
    return view


_METADATA = {
    "shape",
    "dtype",
    "device",
    "ndim",
    "layout",
    "is_cuda",
    "is_cpu",
    "is_meta",
    "is_sparse",
    "is_quantized",
    "requires_grad",
    "grad",
    "grad_fn",
    "is_leaf",
    "names",
    "itemsize",
    "nbytes",
    "size",
    "dim",
    "ndimension",
    "numel",
    "nelement",
    "stride",
    "is_contiguous",
    "is_floating_point",
    "is_complex",
    "element_size",
    "__len__",
    "get_device",
    "storage_offset",
}


def _is_metadata(func: Any) -> bool:
    """Calls that read a tensor's description, never its data."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "")
    return name in _METADATA


def _materialise(x: Any) -> Any:
    """The dense data behind a view; anything else unchanged."""
    if not isinstance(x, CachedTensor):
        return x
    dense = x._pending.dense()[x._side]
    for func, args, kwargs in x._chain:
        dense = func(dense, *args, **kwargs)
    return dense


def _follow(self: CachedTensor, func: Any, args: tuple, kwargs: dict) -> CachedTensor | None:
    """The view that a slice of the sequence or a spelling of head repetition gives, or None."""
    name = getattr(func, "__name__", "")
    stage, end = self._stage, self._end
    if name == "__getitem__" and isinstance(args[1], tuple):
        index = args[1]
        whole = slice(None)
        if stage == "plain" and index == (whole, whole, None, whole, whole):
            stage = "grouped"
        elif stage in ("plain", "repeated") and _is_prefix(index):
            end = index[2].stop
        else:
            return None
    elif name == "unsqueeze" and stage == "plain" and args[1:] == (2,):
        stage = "grouped"
    elif name == "expand" and stage == "grouped":
        stage = "expanded"
    elif name in ("reshape", "view") and stage == "expanded":
        batch, heads, repeat, slots, dim = self.shape
        sizes = args[1] if isinstance(args[1], (tuple, list, torch.Size)) else args[1:]
        if tuple(sizes) not in (
            (batch, heads * repeat, slots, dim),
            (batch, -1, slots, dim),
        ):
            return None
        stage = "repeated"
    elif name == "contiguous":
        return self
    elif name == "repeat_interleave" and stage == "plain":
        repeat = args[1] if len(args) > 1 else kwargs.get("repeats")
        dim = args[2] if len(args) > 2 else kwargs.get("dim")
        if dim not in (1, -3) or not isinstance(repeat, int):
            return None
        with torch._C.DisableTorchFunctionSubclass():
            batch, heads, slots, width = self.shape
            out = self[:, :1].expand(batch, heads * repeat, slots, width)
        chain = (*self._chain, (func, args[1:], kwargs))
        return _wrap(out, self._pending, self._side, chain, "repeated", end)
    else:
        return None
    with torch._C.DisableTorchFunctionSubclass():
        out = func(*args, **kwargs)
    chain = (*self._chain, (func, args[1:], kwargs))
    return _wrap(out, self._pending, self._side, chain, stage, end)


def _is_prefix(index: tuple) -> bool:
    """``[:, :, :n]`` or ``[:, :, :n, :]``."""
    whole = slice(None)
    if len(index) not in (3, 4) or index[:2] != (whole, whole) or index[3:] not in ((), (whole,)):
        return False
    cut = index[2]
    return (
        isinstance(cut, slice)
        and cut.start in (None, 0)
        and cut.step in (None, 1)
        and (isinstance(cut.stop, int) and cut.stop >= 0)
    )


def _check(query: Tensor, key: Tensor, mask: Tensor | None, pending: Pending) -> None:
    """Refuse queries of other rows than the cache has, and a mask of other slots."""
    problem = ""
    if query.dim() != 4 or (query.shape[0], query.shape[3]) != (key.shape[0], key.shape[3]):
        problem = (
            f"queries {list(query.shape)} do not fit keys {list(key.shape)}. Make them "
            "[batch, heads, tokens, head dim] of the same rows"
        )
    elif mask is not None:
        wanted = (*query.shape[:3], key.shape[2])
        sizes = zip(mask.shape, wanted, strict=False)
        if mask.dim() != 4 or any(n not in (1, size) for n, size in sizes):
            problem = (
                f"a mask of {list(mask.shape)} does not fit {list(wanted)}, the queries and the "
                "slots of the cache. Make it with the sizes that cache.get_mask_sizes() gives"
            )
    if problem:
        pending.journal.rollback()
        raise UnsupportedError(f"{pending.where}: {problem}.")


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` whose keys and values are in the cache."""
    same = (
        isinstance(key, CachedTensor)
        and isinstance(value, CachedTensor)
        and key._pending is value._pending
        and (key._side, value._side) == (0, 1)
        and (key._stage, key._end) == (value._stage, value._end)
        and key._stage in ("plain", "repeated")
        and not isinstance(query, CachedTensor)
    )
    pending = key._pending if isinstance(key, CachedTensor) else value._pending
    if dropout_p:
        pending.journal.rollback()
        raise UnsupportedError(
            f"{pending.where}: attention dropout {dropout_p} with a compressed cache. "
            "Call model.eval() first."
        )
    if attn_mask is not None and attn_mask.dim() < 4:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    if isinstance(key, CachedTensor):
        _check(query, key, attn_mask, pending)
    tokens = pending.k.shape[2]
    packed = same and tokens == 1 and query.shape[2] != 1 and query.shape[1] == key.shape[1]
    causal = is_causal and tokens > 1
    if (
        not same
        or (query.shape[2] != tokens and not packed)
        or (attn_mask is None and not causal and tokens > 1)
        or (key._end is not None and not (causal and key._end == tokens))
    ):
        query, key, value, attn_mask = map(_materialise, (query, key, value, attn_mask))
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if packed:  # one token whose query heads were folded into the rows of their kv head
        batch, heads, group, dim = query.shape
        if attn_mask is not None and attn_mask.shape[2] != 1:
            attn_mask = attn_mask.reshape(attn_mask.shape[0], heads * group, 1, -1)
        out = pending.attend(query.reshape(batch, heads * group, 1, dim), attn_mask, False, scale)
        return out.reshape(batch, heads, group, dim)
    return pending.attend(query, attn_mask, causal, scale)
