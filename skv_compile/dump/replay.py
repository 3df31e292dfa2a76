"""What the script of a dumped graph calls: it builds the graph again and runs the pass on it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from ..backend import SkvBackend
from ..cache import phantom
from ..cache.home import make_keeper
from ..cache.state import LayerState
from ..codec.tiers import frames_of
from ..config import Config
from ..errors import SkvError
from ..forecast import plain
from ..patterns import match
from ..report import Report, listening
from ..retention.keeper import Keeper

#: Batch, kv heads, head dim, tokens, dtype and device of a layer's cache.
_Shape = tuple[int, int, int, int, torch.dtype, torch.device]


class Inner:
    """A graph inside of a graph; ``node`` is what stands for it outside, when it is done."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.node: Node | None = None


class Replay:
    """A Dynamo graph, rebuilt call by call.

    Args:
        settings: fields of :class:`Config`, of the backend.
        grad: whether gradients were enabled.
    """

    def __init__(self, settings: dict[str, Any], *, grad: bool) -> None:
        self._config, self._grad = Config(**settings), grad
        self._mode = FakeTensorMode(shape_env=ShapeEnv())
        self._root = torch.nn.Module()
        self._graphs = [Graph()]
        self._fakes: list[Any] = []
        self._real: list[Callable[[], Any]] = []  # makes the input, with memory
        self._shares: list[Tensor | None] = []  # the memory that it has a part of
        self._phantoms: set[Node] = set()
        self._states: dict[Keeper, list[LayerState]] = {}
        self._made_of: dict[Keeper, tuple[Config, _Shape, int]] = {}
        self._trace: str | None = None
        self._moved: set[str] = set()

    # ------------------------------------------------------------ inputs

    def symbol(self, name: str, hint: int) -> Any:
        """A size that Dynamo made symbolic; it was ``hint`` when the graph was traced."""
        env = self._mode.shape_env
        assert env is not None
        source = ConstantSource(name)
        low = hint < 2
        made = env.create_symbol(hint, source, DimDynamic.DYNAMIC, do_not_specialize_zero_one=low)
        return env.create_symintnode(made, hint=hint, source=source)

    def device(self, name: str) -> torch.device:
        """A device; the CPU in place of an accelerator that is not there, which is said."""
        device = torch.device(name)
        if device.type == "cpu" or _is_there(device):
            return device
        if name not in self._moved:
            print(f"There is no {name} here; the CPU stands for it.", file=sys.stderr)
            self._moved.add(name)
        return torch.device("cpu")

    def integer(self, name: str, value: Any) -> Node:
        """An input that is a number."""
        return self._input(name, value, lambda: value, None)

    def memory(self, size: int, device: str) -> Tensor:
        """Bytes that several inputs have parts of, or one has only a part of."""
        return torch.empty(size, dtype=torch.uint8, device=self.device(device))

    def input(
        self,
        name: str,
        dtype: torch.dtype,
        shape: Sequence[Any],
        stride: Sequence[Any],
        device: str,
        *,
        requires_grad: bool = False,
        source: str = "",
        state: LayerState | None = None,
        memory: tuple[Tensor, Any] | None = None,
        first_forward: bool = False,
    ) -> Node:
        """An input that is a tensor. ``source``: where Dynamo found it. ``state``: of the
        compressed cache that it stands for. ``memory``: bytes and the offset in them, in elements
        of ``dtype``. ``first_forward``: a cache layer that this forward allocates."""
        where = self.device(device)
        with self._mode:
            fake = torch.empty_strided(shape, stride, dtype=dtype, device=where)
            fake.requires_grad_(requires_grad)

        def real() -> Tensor:
            sizes, steps = plain(shape), plain(stride)
            if memory is not None:
                storage, offset = memory[0].untyped_storage(), plain([memory[1]])[0]
                made = torch.empty(0, dtype=dtype, device=where)
                made.set_(storage, offset, sizes, steps)
            else:
                made = torch.empty_strided(sizes, steps, dtype=dtype, device=where)
            made.requires_grad_(requires_grad)
            if state is not None:
                phantom.attach(made, state)
            if first_forward:
                made._skv_first_forward = True
            return made

        if first_forward:
            fake._skv_first_forward = True
        node = self._input(name, fake, real, None if memory is None else memory[0])
        if state is not None:
            self._phantoms.add(node)
        if source:
            node._dynamo_source = ConstantSource(source)
        return node

    def _input(self, name: str, fake: Any, real: Callable[[], Any], shares: Tensor | None) -> Node:
        node = self.placeholder(name)
        node.meta["example_value"] = fake
        self._fakes.append(fake)
        self._real.append(real)
        self._shares.append(shares)
        return node

    def pool(
        self,
        settings: dict[str, Any],
        *,
        layers: int,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: str,
        group: int,
        budget: int | None,
        turned: bool,
    ) -> Keeper:
        """The pool of a compressed cache. ``settings``: of the cache. ``shape``: batch, kv heads,
        head dim and tokens; the rest as for ``make_keeper``."""
        config, where = Config(**settings), self.device(device)
        keeper = make_keeper(config, layers, *shape, dtype, where, group, budget, turned)
        self._made_of[keeper] = (config, (*shape, dtype, where), group)
        self._states[keeper] = []
        return keeper

    def state(self, keeper: Keeper, index: int, adopted: bool = False) -> LayerState:
        """A layer of a pool, by its number."""
        config, shape, group = self._made_of[keeper]
        dim, where = shape[2], shape[-1]
        # Plans and frames have sizes only: nothing is computed with them.
        turn = torch.zeros(2, dim, device=where) if keeper.layout.block else None
        made = self._states[keeper]
        while len(made) <= index:
            made.append(
                LayerState(
                    config,
                    *shape,
                    turn=turn,
                    saved=lambda heads, layout: frames_of(layout, heads, where),
                    group=group,
                    keeper=keeper,
                )
            )
        made[index].adopted = adopted
        return made[index]

    # ------------------------------------------------------------ nodes

    def at(self, where: str) -> None:
        """The source line, "file.py:12 in forward", of the nodes that follow."""
        self._trace = None
        if where:
            place, function = where.split(" in ", 1)
            file, line = place.rsplit(":", 1)
            # As if it were installed, so that the name is kept whole.
            self._trace = f'  File "site-packages/{file}", line {line}, in {function}\n'

    def placeholder(self, name: str) -> Node:
        """An input of the graph that is being built."""
        return self._graphs[-1].create_node("placeholder", name, name=name)

    def function(self, name: str, target: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Node:
        """A call of a function."""
        return self._node("call_function", name, target, args, kwargs)

    def method(self, name: str, target: str, /, *args: Any, **kwargs: Any) -> Node:
        """A call of a method of the first argument."""
        return self._node("call_method", name, target, args, kwargs)

    def constant(
        self,
        name: str,
        dtype: torch.dtype,
        shape: Sequence[int],
        stride: Sequence[int],
        device: str,
    ) -> Node:
        """A tensor that is part of the graph."""
        with self._mode:
            fake = torch.empty_strided(shape, stride, dtype=dtype, device=self.device(device))
        self._root.register_buffer(name, fake)
        return self._node("get_attr", name, name, (), {})

    @contextmanager
    def inner(self, name: str) -> Iterator[Inner]:
        """While it lasts, nodes go into a graph of their own, which ``name`` then stands for."""
        made = Inner()
        self._graphs.append(made.graph)
        try:
            yield made
        finally:
            self._graphs.pop()
        self._root.add_module(name, GraphModule(self._root, made.graph))
        made.node = self._node("get_attr", name, name, (), {})

    def output(self, result: Any) -> None:
        """What the graph returns."""
        self._graphs[-1].output(result)

    def _node(self, op: str, name: str, target: Any, args: tuple, kwargs: dict) -> Node:
        node = self._graphs[-1].create_node(op, target, args, kwargs, name=name)
        if self._trace:
            node.meta["stack_trace"] = self._trace
        return node

    # ------------------------------------------------------------ the pass

    def module(self) -> GraphModule:
        """The graph, with the values of its nodes as Dynamo records them."""
        gm = GraphModule(self._root, self._graphs[0])
        with torch.set_grad_enabled(self._grad), self._mode:
            _Recorder(gm).run(*self._fakes)
        return gm

    def inputs(self, gm: GraphModule) -> list[Any]:
        """The inputs: caches and what shares their memory are real, the rest has no memory."""
        places = [node for node in gm.graph.nodes if node.op == "placeholder"]
        found = match(gm.graph)
        caches = {write.cache for site in found.sites for write in (site.key, site.value)}
        caches |= self._phantoms
        held = [
            shares
            for node, shares in zip(places, self._shares, strict=True)
            if node in caches and shares is not None
        ]
        rows = zip(places, self._fakes, self._real, self._shares, strict=True)
        return [
            real() if node in caches or any(shares is x for x in held) else fake
            for node, fake, real, shares in rows
        ]

    def report(self) -> tuple[Report, SkvError | None]:
        """Run the pass: what became of the attentions, and what was raised after that."""
        gm = self.module()
        inputs = self.inputs(gm)
        backend = SkvBackend(config=self._config, options={"inner": "eager"})
        refused: SkvError | None = None
        with (
            listening() as graphs,
            torch.set_grad_enabled(self._grad),
            tracing(TracingContext(self._mode)),
        ):
            try:
                backend(gm, inputs)
            except SkvError as error:
                refused = error
        return Report(tuple(graphs)), refused

    def main(self) -> int:
        """Run the pass and print its report; the exit code."""
        report, refused = self.report()
        print(report)
        if refused is not None:
            print(f"error: {refused}", file=sys.stderr)
            return 2
        return 0


class _Recorder(Interpreter):
    """Leaves in every node the value that it has."""

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        n.meta["example_value"] = value
        return value


def _is_there(device: torch.device) -> bool:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):  # a build without it asserts
        return False
    return True
