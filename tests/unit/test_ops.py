"""The ops as torch.library sees them."""

from __future__ import annotations

import pytest
import torch
from support import layer_state, store
from torch._subclasses.fake_tensor import FakeTensorMode

from skv_compile.errors import SkvError
from skv_compile.lowering import ops
from skv_compile.lowering.layout import Layout
from skv_compile.lowering.state import State

BATCH, HEADS, GROUP, DIM, SLOTS = 2, 2, 2, 16, 64

CODECS = pytest.mark.parametrize("codec", ["identity", "grid"])


def call(codec: str, tokens: int, start: int = 0, mask: bool = True):
    """(attend arguments, append arguments) on a state that has seen ``start`` tokens."""
    state = layer_state(codec, BATCH, HEADS, DIM, SLOTS, poison=False)
    state.tensors.pool.zero_()
    if start:
        x = torch.randn(BATCH, HEADS, start, DIM)
        store(state, x, x, None, torch.arange(start))
    q = torch.randn(BATCH, HEADS * GROUP, tokens, DIM)
    k, v = torch.randn(2, BATCH, HEADS, tokens, DIM).unbind()
    position = torch.arange(start, start + tokens)
    see = (torch.arange(SLOTS) <= position[:, None])[None, None] if mask else None
    key = state.layout.key
    # opcheck compares inputs by value, and an op may not alias two of them.
    tensors = [x.clone() for x in state.tensors]
    return (
        (q, k, v, see, position, *tensors, False, 0.25, key),
        (k, v, see, position, *tensors[:4], key),
    )


@pytest.mark.parametrize(("tokens", "start"), [(1, 50), (30, 0), (10, 33)])
@CODECS
def test_attend_passes_opcheck(codec: str, tokens: int, start: int) -> None:
    torch.library.opcheck(ops.attend, call(codec, tokens, start)[0])


@pytest.mark.parametrize(("tokens", "start"), [(1, 50), (30, 0), (10, 33)])
@CODECS
def test_append_passes_opcheck(codec: str, tokens: int, start: int) -> None:
    torch.library.opcheck(ops.append, call(codec, tokens, start)[1])


@CODECS
def test_ops_without_a_mask_pass_opcheck(codec: str) -> None:
    attend, append = call(codec, 1, 20, mask=False)
    torch.library.opcheck(ops.attend, attend)
    torch.library.opcheck(ops.append, append)


@pytest.mark.parametrize("start", [0, 20])
@pytest.mark.parametrize("transposed", [False, True])
@CODECS
def test_the_fake_output_is_the_real_one_without_data(codec, transposed: bool, start: int) -> None:
    arguments = list(call(codec, 3, start)[0])
    if transposed:  # as models make queries: [B, T, H, D] seen as [B, H, T, D]
        arguments[0] = arguments[0].transpose(1, 2).contiguous().transpose(1, 2)
    real = ops.attend(*arguments)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        fake = ops.attend(*fakes)
    for name in ("shape", "dtype", "device"):
        assert getattr(fake, name) == getattr(real, name)
    assert fake.stride() == real.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attend_answers_in_the_dtype_of_the_queries(dtype: torch.dtype) -> None:
    state = layer_state("grid", BATCH, HEADS, DIM, SLOTS, dtype)
    x = torch.randn(BATCH, HEADS, 1, DIM, dtype=dtype)
    out = state.attend(x, x, x, None, torch.tensor([0]), False, 0.25)
    assert out.dtype == dtype
    # The only token sees itself.
    assert torch.equal(out, x)


def test_append_says_which_arguments_it_changes_and_attend_changes_none() -> None:
    def mutated(op) -> list[str]:
        arguments = op._schema.arguments
        return [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]

    assert mutated(ops.append) == ["exact_keys", "exact_values", "queries", "meta"]
    assert mutated(ops.attend) == []


def test_the_schema_takes_the_state_in_its_own_order() -> None:
    for op, count in ((ops.append, 4), (ops.attend, 17), (ops.retain_many, 17)):
        names = [a.name for a in op._schema.arguments]
        begin = names.index("exact_keys")
        assert tuple(names[begin : begin + count]) == State._fields[:count]
    assert len(State._fields) == 20


@CODECS
def test_attend_leaves_the_state_as_it_is(codec: str) -> None:
    arguments = call(codec, 10, 33)[0]
    before = [x.clone() for x in arguments if isinstance(x, torch.Tensor)]
    ops.attend(*arguments)
    after = [x for x in arguments if isinstance(x, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_slots_that_were_never_rewritten_say_so() -> None:
    with pytest.raises(SkvError, match=r"backend='skv'.*skv\.explain"):
        ops.slots(torch.tensor(0), 1)


def test_a_layout_key_is_parsed_once() -> None:
    key = layer_state("grid").layout.key
    assert Layout.parse(key) is Layout.parse(key)
