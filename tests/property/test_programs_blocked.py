"""Programs with a distractor: the attention that has it stays as the model wrote it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from programs import DISTRACTORS, EXAMPLES, MANUAL_ONLY, Program, is_possible, one_forward, programs
from programs_run import check, run

from skv_compile import UnsupportedError

EVERY = tuple(DISTRACTORS)


def plain(distractor: str) -> Program:
    """The plainest program with a distractor."""
    manual = distractor in MANUAL_ONLY
    return Program(
        distractor=distractor,
        steps=1,
        group=2 if distractor == "tiled" else 1,
        attention="matmul" if manual else "sdpa",
        mask="additive" if distractor == "mask_scaled" else "bool",
    )


def check_blocked(program: Program) -> None:
    if program.distractor == "gradients":
        with pytest.raises(Exception, match="A gradient is required") as error:
            run(program)
        assert isinstance(getattr(error.value, "inner_exception", None), UnsupportedError)
    else:
        check(run(program))


@pytest.mark.parametrize("distractor", EVERY)
def test_a_distractor_keeps_an_attention_dense(distractor: str) -> None:
    check_blocked(plain(distractor))


@pytest.mark.slow
@settings(max_examples=EXAMPLES or 60)
@given(programs(distractors=EVERY))
def test_a_distractor_anywhere_keeps_an_attention_dense(program: Program) -> None:
    assert is_possible(program)
    check_blocked(program)


@pytest.mark.slow
@settings(max_examples=EXAMPLES or 1000)
@given(programs(distractors=EVERY).map(one_forward))
def test_a_distractor_keeps_a_first_forward_dense(program: Program) -> None:
    check_blocked(program)
