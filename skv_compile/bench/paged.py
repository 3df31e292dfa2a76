"""FlashInfer's attention of a decoding step, from pages in random order."""

from __future__ import annotations

from functools import partial

import torch

from .extras import installed
from .timing import Launch

PACKAGE = "flashinfer"
PAGE = 16  # tokens
WORKSPACE = 128 << 20  # bytes, as FlashInfer recommends
#: name -> what keys and values are stored as; queries are bfloat16
PAGED = {"flashinfer bf16": torch.bfloat16, "flashinfer fp8": torch.float8_e4m3fn}


def names() -> list[str]:
    """What is measured: nothing where FlashInfer is not installed."""
    return [*PAGED] if installed(PACKAGE) else []


def missing() -> list[str]:
    """Why nothing is measured, if so."""
    return [] if installed(PACKAGE) else [f"{PACKAGE} is not installed"]


def launches(
    dtype: torch.dtype, q: torch.Tensor, heads: int, tokens: int, sets: int
) -> list[Launch]:
    """Attention of ``q`` (batch, query heads, 1, dimension) to each of ``sets`` caches.

    Planned here, once: only the kernels are launched. The caches are alike, so they share a table
    of pages and a workspace.
    """
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    if tokens % PAGE:
        raise ValueError(f"{tokens} tokens do not fill pages of {PAGE}.")
    batch, query_heads, _, dim = q.shape
    pages = tokens // PAGE
    like = {"device": q.device, "dtype": torch.int32}
    workspace = torch.zeros(WORKSPACE, device=q.device, dtype=torch.uint8)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    wrapper.plan(
        torch.arange(batch + 1, **like) * pages,
        torch.randperm(batch * pages, **like),
        torch.full((batch,), PAGE, **like),
        query_heads,
        heads,
        dim,
        PAGE,
        q_data_type=q.dtype,
        kv_data_type=dtype,
    )
    made: list[Launch] = []
    for _ in range(sets):
        shape = (batch * pages, 2, heads, PAGE, dim)
        pool = torch.randn(shape, device=q.device, dtype=q.dtype).to(dtype)
        made.append(partial(wrapper.run, q.squeeze(2), pool))
    return made
