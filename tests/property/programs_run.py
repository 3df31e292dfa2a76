"""A :class:`Program` run dense and through the pass, with every graph that the pass saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import currently_in_test_context, note
from programs import Program, expected
from programs_source import as_file, inputs, to_module
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.utils import counters
from torch._guards import TracingContext
from torch.fx import GraphModule, Interpreter

from skv_compile.backend import SkvBackend
from skv_compile.patterns import Match, match

SETTINGS = {"codec": "identity", "sinks": 2, "recent": 5, "page_tokens": 8, "retention": "none"}


def layout_of(x: Any) -> tuple:
    """Shape, dtype and strides; strides of axes of size one say nothing."""
    strides = tuple(s for s, n in zip(x.stride(), x.shape, strict=True) if n != 1)
    return tuple(x.shape), x.dtype, strides


@dataclass
class Seen:
    """One graph: its code before and after, and what the pass found in it."""

    before: str
    found: Match
    codes: list[str]
    """Of every refusal that the backend speaks of, its own among them."""
    after: str = ""
    module: GraphModule | None = None
    """What was compiled."""
    layouts: tuple[list, ...] = ()
    """Of the outputs: of Dynamo's graph, and of ours under fake propagation."""
    original_changed: bool = False

    @property
    def rewritten(self) -> int:
        return self.after.count("torch.ops.skv.attend.default(")


class Watching(SkvBackend):
    """The backend without Inductor, which notes what it does to every graph."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(options={"inner": "eager", **settings})
        self.seen: list[Seen] = []

    def __call__(self, gm: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        before = gm.code
        self.seen.append(Seen(before, match(gm.graph), []))
        outputs = gm.graph.output_node().args[0]
        self._wanted = [layout_of(x.meta["example_value"]) for x in outputs]
        compiled = super().__call__(gm, example_inputs)
        self.seen[-1].original_changed = gm.code != before
        return compiled

    def _speak_of(self, found: Match) -> None:
        self.seen[-1].codes = [refusal.code for refusal in found.refusals]

    def _compile(self, gm: GraphModule, example_inputs: list[Any], config: Any) -> Any:
        seen = self.seen[-1]
        seen.after, seen.module = gm.code, gm
        gm.graph.lint()
        mode = TracingContext.get().fake_mode
        assert mode is not None
        values = [n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder"]
        with mode, enable_python_dispatcher():  # for symbolic sizes, as Dynamo does
            made = Interpreter(gm).run(*map(_alike, values))
        seen.layouts = self._wanted, [layout_of(x) for x in made]
        return super()._compile(gm, example_inputs, config)


def _alike(x: Any) -> Any:
    """An input that looks like this one, in the fake mode of now."""
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


@dataclass
class Ran:
    """Outputs of every forward, dense and through the pass, and the graphs."""

    program: Program
    want: list[list[Tensor]]
    got: list[list[Tensor]]
    seen: list[Seen] = field(default_factory=list)
    graphs: list[int] = field(default_factory=list)
    """How many there were after each forward."""


def outputs(made: Any) -> list[Tensor]:
    return list(made) if isinstance(made, tuple) else [made]


def forward(program: Program, model: Callable[..., Any], arguments: tuple) -> list[Tensor]:
    """One forward; the same random numbers for every model."""
    torch.manual_seed(program.seed)
    with torch.set_grad_enabled(program.distractor == "gradients"):
        return [x.detach().clone() for x in outputs(model(*arguments))]


def compiled(program: Program, **settings: Any) -> tuple[nn.Module, Callable[..., Any], list[Seen]]:
    """The module, the same one compiled, and the list of graphs to come."""
    (note if currently_in_test_context() else print)(as_file(program))
    torch._dynamo.reset()
    counters.clear()
    model = to_module(program)
    backend = Watching(**{**SETTINGS, **settings})
    return model, torch.compile(model, backend=backend, fullgraph=True), backend.seen


def run(program: Program, **settings: Any) -> Ran:
    """Every forward of a program, dense and through the pass."""
    _, step, seen = compiled(program, **settings)
    dense = to_module(program)
    ran = Ran(program, [], [], seen)
    for arguments in inputs(program):
        ran.want.append(forward(program, dense, arguments))
        ran.got.append(forward(program, step, arguments))
        ran.graphs.append(len(seen))
    return ran


def tolerance(program: Program) -> float:
    """Rounding of a dtype, with room for two layers and another order of sums."""
    eps = torch.finfo(getattr(torch, program.dtype)).eps
    return 16 * max(eps, 2e-7)


def difference(program: Program, want: Tensor, got: Tensor, start: int) -> float:
    """Largest difference relative to the size of what is wanted, of tokens that are no padding."""
    if want.dim() == 3 and want.shape[:1] == (program.batch,):
        slot = torch.arange(start, start + want.shape[1])
        real = slot >= torch.tensor(program.pads)[:, None]
        want, got = want[real], got[real]
    if want.numel() == 0:
        return 0.0
    error = (want.double() - got.double()).abs().max().item()
    return error / max(1.0, want.double().abs().max().item())


def check(ran: Ran) -> None:
    """Every statement about one program, on one run of it."""
    program, owed = ran.program, expected(ran.program)
    for seen in ran.seen:
        assert (seen.rewritten, tuple(seen.codes)) == (owed.rewrites, owed.codes)
        assert not seen.original_changed
        # Fake propagation finds the outputs that Dynamo promised to the model.
        assert seen.layouts[0] == seen.layouts[1]
        # Of the pass's own result it would rewrite nothing.
        assert seen.module is not None
        again = match(seen.module.graph)
        assert len(again.sites) + len(again.refusals) == len(owed.codes)
        if not owed.rewrites:
            assert seen.after == seen.before
    # The first step may be a graph, the second one where a start has become a symbol.
    later = ran.graphs[len(program.chunks) + 1 :]
    assert len(set(later)) <= 1
    for (*_, start), want, got in zip(inputs(program), ran.want, ran.got, strict=True):
        for n, (one, other) in enumerate(zip(want, got, strict=True)):
            assert other.dtype == one.dtype
            if not owed.rewrites:
                assert torch.equal(one.nan_to_num(), other.nan_to_num())
            elif n == 0 or program.mask != "padded":  # else it may show what padding became
                assert difference(program, one, other, start) < tolerance(program)
