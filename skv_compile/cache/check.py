"""What a layer is given, looked at before anything is allocated or counted."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import CacheStateError, UnsupportedError


def check_pair(where: str, k: Any, v: Any) -> None:
    """Refuse what are no keys and values of the same tokens."""
    for name, x in (("keys", k), ("values", v)):
        if not isinstance(x, Tensor) or x.dim() != 4:
            found = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise UnsupportedError(
                f"{where}: {name} are {found}; expected a tensor "
                "[batch, kv heads, tokens, head dim]."
            )
    if v.shape[-1] != k.shape[-1] or v.shape[1] != k.shape[1]:
        raise UnsupportedError(
            f"{where}: keys are [{k.shape[1]} heads, {k.shape[-1]}], values "
            f"[{v.shape[1]} heads, {v.shape[-1]}]; a compressed layer "
            "needs equal shapes. Use a dense cache for this model."
        )
    if (v.shape, v.dtype, v.device) != (k.shape, k.dtype, k.device):
        raise UnsupportedError(
            f"{where}: keys are {list(k.shape)} {k.dtype} on {k.device}, values "
            f"{list(v.shape)} {v.dtype} on {v.device}. Give both the same shape, dtype and device."
        )


def check_rows(where: str, rows: int, others: list[int]) -> None:
    """Refuse rows that other layers do not have."""
    for other in others:
        if other != rows:
            raise CacheStateError(
                f"{where} was given {rows} rows, and other layers hold {other}. Give every layer "
                "the same rows, or make a new SphericalCache."
            )
