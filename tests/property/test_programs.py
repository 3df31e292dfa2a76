"""What the pass owes every program that attends to a cache.

One run of a program answers most questions, so most of them are asked of each (``check``). A
failing program is printed as a file that runs by itself. SKV_EXAMPLES=2000 tries as many.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from programs import (
    ATTENTIONS,
    BOOL_MASKS,
    EXAMPLES,
    MASKS,
    SCALES,
    WRITES,
    Program,
    is_possible,
    one_forward,
    programs,
)
from programs_run import check, compiled, difference, forward, run, tolerance
from programs_source import inputs, to_module

from skv_compile import Config
from skv_compile.cache import phantom
from skv_compile.salt import config_patches

# ---------------------------------------------------------------- rewritten, and right


@settings(max_examples=EXAMPLES or 8)
@given(programs())
def test_a_program_is_rewritten_and_means_the_same(program: Program) -> None:
    assert is_possible(program)
    check(run(program))


@pytest.mark.parametrize("write", WRITES)
def test_every_write_is_rewritten_over_several_forwards(write: str) -> None:
    """A later forward of several tokens is traced on buffers that are phantoms by then."""
    check(run(Program(chunks=(3, 4), steps=3, write=write, kv_heads=2)))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("mask", ["two_axes", "bias", "flag"])
def test_every_attention_is_rewritten(attention: str, mask: str) -> None:
    check(run(Program(attention=attention, mask=mask, kv_heads=2, group=2, steps=1)))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("attention", ["sdpa", "matmul"])
def test_every_scale_is_rewritten(attention: str, scale: str) -> None:
    check(run(Program(attention=attention, scale=scale, steps=1)))


@pytest.mark.slow
@settings(max_examples=EXAMPLES or 60)  # each takes about a second
@given(programs())
def test_many_programs_are_rewritten_and_mean_the_same(program: Program) -> None:
    assert is_possible(program)
    check(run(program))


@pytest.mark.slow
@settings(max_examples=EXAMPLES or 1000)
@given(programs().map(one_forward))
def test_a_first_forward_is_rewritten_and_means_the_same(program: Program) -> None:
    check(run(program))


@pytest.mark.slow
@settings(max_examples=10)
@given(programs(dtype="float32", steps=2))
def test_a_program_means_the_same_through_inductor(program: Program) -> None:
    assume(len(program.chunks) == 1)
    check(run(program, inner="inductor"))


@pytest.mark.parametrize("codec", ["grid", "frame"])
@settings(max_examples=EXAMPLES or 3)
@given(program=programs(dtype="float32", slots=64, steps=3))
def test_coded_attention_is_the_program_over_what_the_codes_decode_to(codec, program) -> None:
    assume(program.mask != "padded")  # what a module makes of padding is its own affair
    model, step, seen = compiled(program, codec=codec, bits=3.0)
    dense = to_module(program)
    for x, pos, start in inputs(program):
        if start:  # the dense module sees what the codes say
            for mine, other in zip(model.layers, dense.layers, strict=True):
                state = phantom.state_of(mine.keys)
                state.keeper.tick(len(pos))  # as the step will, which then moves nothing more
                for buffer, decoded in zip((other.keys, other.values), state.dense(), strict=True):
                    buffer.copy_(decoded)
        want, got = (forward(program, f, (x, pos, start)) for f in (dense, step))
        assert difference(program, want[0], got[0], start) < 1e-4
    assert all(graph.rewritten == program.layers for graph in seen)


# ---------------------------------------------------------------- the same, said otherwise


def together(program: Program) -> torch.Tensor:
    return torch.cat([got[0] for got in run(program).got], 1)


PLAIN_MASKS = tuple(m for m in MASKS if m not in ("flag", "padded"))


@settings(max_examples=EXAMPLES or 2)
@given(programs(dtype="float32", steps=1), st.sampled_from(PLAIN_MASKS))
def test_stepping_is_chunking(program: Program, mask: str) -> None:
    program = replace(program, mask=mask)
    stepped = replace(program, chunks=(1,) * sum(program.chunks))
    assert difference(program, together(program), together(stepped), 0) < tolerance(program)


@settings(max_examples=EXAMPLES or 2)
@given(programs(dtype="float32", batch=2, steps=1), st.sampled_from(PLAIN_MASKS))
def test_rows_do_not_see_one_another(program: Program, mask: str) -> None:
    program = replace(program, mask=mask)
    alone = replace(program, batch=1)
    _, step, _ = compiled(alone)
    first = torch.cat(
        [forward(alone, step, (x[:1], pos, start))[0] for x, pos, start in inputs(program)], 1
    )
    assert difference(alone, together(program)[:1], first, 0) < tolerance(program)


@pytest.mark.slow
@settings(max_examples=EXAMPLES or 2)
@given(programs(dtype="float32", kv_heads=2, steps=1), st.sampled_from(BOOL_MASKS))
def test_heads_may_trade_places(program: Program, mask: str) -> None:
    program = replace(program, mask=mask, fill="min")
    model, step, _ = compiled(program)
    dim = program.head_dim
    for layer in model.layers:
        size = program.group * dim
        kinds = layer.qkv.weight.split([2 * size, 2 * dim, 2 * dim])
        swapped = [torch.cat(part.chunk(2)[::-1]) for part in kinds]
        layer.qkv.weight.data = torch.cat(swapped)
        layer.out.weight.data = torch.cat(layer.out.weight.chunk(2, 1)[::-1], 1)
    got = torch.cat([forward(program, step, a)[0] for a in inputs(program)], 1)
    assert difference(program, together(program), got, 0) < tolerance(program)


# ---------------------------------------------------------------- keys of caches


@pytest.mark.slow
@settings(max_examples=EXAMPLES or 2)
@given(programs(steps=1, layers=1))
def test_one_program_is_one_text_and_another_config_another(program: Program) -> None:
    texts = [[seen.after for seen in run(program).seen] for _ in range(2)]
    assert texts[0] == texts[1]
    other = run(program, codec="grid", bits=3.0)
    assert all(seen.after not in texts[0] for seen in other.seen)


CHANGES = {
    "bits": st.floats(0.5, 64).filter(lambda x: x != Config().bits),
    "codec": st.sampled_from(["grid", "rings", "identity"]),
    "retention": st.sampled_from(["none", "h2o"]),
    "sinks": st.integers(0, 100).filter(lambda x: x != Config().sinks),
    "recent": st.integers(1, 999).filter(lambda x: x != Config().recent),
    "page_tokens": st.sampled_from([8, 16, 24]),
    "budget": st.integers(1, 1 << 40),
    "frame": st.just("frames.safetensors"),
    "strict": st.just(True),
}


@given(st.data())
@pytest.mark.parametrize("field", CHANGES)
def test_every_field_of_a_config_is_in_the_key(field: str, data) -> None:
    def key(config: Config):
        return config_patches(config)["post_grad_custom_pre_pass"].uuid()

    assert key(Config()) == key(Config())
    changed = Config(**{field: data.draw(CHANGES[field])})
    assert key(changed) not in (None, key(Config()))
    assert key(changed) == key(changed.replace())
