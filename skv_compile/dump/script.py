"""A graph from Dynamo -> a script that rebuilds it node by node and runs the pass on it."""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.node import _get_qualified_name

from ..cache import phantom
from ..cache.state import LayerState
from ..config import Config
from ..leave import source_name
from ..patterns.where import where
from ..versions import versions

_HEAD = '''"""A graph that Dynamo gave to the backend "skv", rebuilt node by node.

    python {name}

runs the pass on it and prints what became of each attention. Shapes, strides, dtypes and devices
of the inputs are those of the run, and so is which of them share memory. What they held, weights
among them, is not here: the pass does not look at it.

Written with {versions}.
"""

'''
_PLAIN = (type(None), bool, int, str, bytes, complex)
_OWN_WORDS = ("graph", "build", "operator", "torch", "Replay", "SETTINGS", "inf", "nan")


class CannotRebuild(Exception):
    """A graph has something that no line of a script stands for."""


def script(gm: GraphModule, inputs: Sequence[Any], config: Config, name: str) -> str:
    """The script's text.

    Args:
        gm, inputs: from Dynamo.
        config: of the backend.
        name: the file that it is for.

    Raises:
        CannotRebuild: with the reason.
    """
    writer = _Writer()
    body = writer.graph(gm, inputs)
    found = ", ".join(f"{k} {v}" for k, v in versions().items() if v)
    modules = "".join(f"import {module}\n" for module in sorted(writer.modules | {"torch"}))
    settings = ",\n".join(f"    {k!r}: {v!r}" for k, v in asdict(config).items())
    return (
        _HEAD.format(name=name, versions=found)
        + f"{modules}\nfrom skv_compile.dump.replay import Replay\n\n"
        + f"SETTINGS = {{\n{settings},\n}}\n\n"
        + f"graph = Replay(SETTINGS, grad={torch.is_grad_enabled()})\n\n"
        + "\n".join(body)
        + "\n\nraise SystemExit(graph.main())\n"
    )


class _Writer:
    """Lines of one script. ``modules``: what they need imported."""

    def __init__(self) -> None:
        self.modules: set[str] = set()
        self._taken: set[str] = set(_OWN_WORDS)
        self._of: dict[Any, str] = {}  # nodes, pools, states, memory -> their variables
        self._symbols: dict[str, str] = {}
        self._shared: Counter[int] = Counter()

    def graph(self, gm: GraphModule, inputs: Sequence[Any]) -> list[str]:
        """Lines that rebuild a graph with its inputs."""
        self._shared = Counter(_memory(x) for x in inputs if isinstance(x, Tensor))
        nodes = list(gm.graph.nodes)
        places = [node for node in nodes if node.op == "placeholder"]
        lines: list[str] = []
        for node in places:
            lines += self._symbols_of(node.meta.get("example_value"))
        for node, given in zip(places, inputs, strict=True):
            lines += self._placeholder(node, given)
        return [*lines, "", *self._calls(gm, nodes)]

    # ------------------------------------------------------------ inputs

    def _symbols_of(self, value: Any) -> Iterator[str]:
        sizes = [*value.shape, *value.stride()] if isinstance(value, Tensor) else [value]
        for size in sizes:
            if not isinstance(size, torch.SymInt):
                continue
            for symbol in sorted(size.node.expr.free_symbols, key=str):
                if str(symbol) in self._symbols:
                    continue
                hint = _hint(size, symbol)
                name = self._variable(str(symbol), str(symbol))
                self._symbols[str(symbol)] = name
                yield f"{name} = graph.symbol({str(symbol)!r}, {hint})"

    def _placeholder(self, node: Node, given: Any) -> Iterator[str]:
        example = node.meta.get("example_value")
        if isinstance(example, (int, torch.SymInt)) and not isinstance(example, bool):
            name = self._variable(node, node.name)
            yield f"{name} = graph.integer({node.name!r}, {self._literal(example)})"
            return
        if not isinstance(example, Tensor) or not isinstance(given, Tensor):
            raise CannotRebuild(f"input {node.name} is a {type(given).__name__}")
        if type(given) not in (Tensor, FakeTensor, torch.nn.Parameter):
            raise CannotRebuild(f"input {node.name} is a {type(given).__name__}")
        more: dict[str, str] = {}
        if given.requires_grad:
            more["requires_grad"] = "True"
        if example.dim() == 4 and (source := source_name(node)):
            more["source"] = repr(source)
        state = phantom.state_of(given)
        if state is not None:
            yield from self._state(state)
            more["state"] = self._of[state]
        elif self._shared[_memory(given)] > 1 or _is_part(given):
            yield from self._memory_of(given)
            offset = given.storage_offset()
            more["memory"] = f"({self._of[_memory(given)]}, {self._literal(offset)})"
        if getattr(given, "_skv_first_forward", False):
            more["first_forward"] = "True"
        shape, stride = (self._literal(tuple(x)) for x in (example.shape, example.stride()))
        words = [repr(node.name), str(example.dtype), shape, stride, repr(str(example.device))]
        words += [f"{key}={value}" for key, value in more.items()]
        yield f"{self._variable(node, node.name)} = graph.input({', '.join(words)})"

    def _memory_of(self, given: Tensor) -> Iterator[str]:
        key = _memory(given)
        if key not in self._of:
            name = self._variable(key, "memory")
            size = given.untyped_storage().nbytes()
            yield f"{name} = graph.memory({size}, {str(given.device)!r})"

    def _state(self, state: LayerState) -> Iterator[str]:
        """A compressed cache, and the pool that it has a part of."""
        keeper = state.keeper
        if keeper not in self._of:
            layout = keeper.layout
            shape = (state.batch, state.heads, layout.head_dim, layout.max_tokens)
            yield (
                f"{self._variable(keeper, 'pool')} = graph.pool(\n"
                f"    {asdict(state.config)!r},\n"
                f"    layers={keeper.pool.layers}, shape={shape}, dtype={state.dtype}, "
                f"device={str(state.device)!r},\n"
                f"    group={state.group}, budget={keeper.budget}, turned={layout.block > 0},\n"
                ")"
            )
        if state not in self._of:
            name = self._variable(state, "state")
            adopted = ", adopted=True" if state.adopted else ""
            yield f"{name} = graph.state({self._of[keeper]}, {state.index}{adopted})"

    # ------------------------------------------------------------ nodes

    def _calls(self, gm: GraphModule, nodes: Iterable[Node]) -> Iterator[str]:
        line = None
        for node in nodes:
            if node.op == "placeholder":
                continue
            if (here := where(node)) != line and node.op != "output":
                line = here
                yield f"graph.at({here!r})"
            if node.op == "output":
                yield f"graph.output({self._literal(node.args[0])})"
            elif node.op == "get_attr":
                yield from self._attribute(gm, node)
            elif node.op == "call_method":
                yield self._call(node, "method", repr(node.target))
            elif node.op == "call_function":
                assert callable(node.target)
                yield self._call(node, "function", self._named(node.target, node.name))
            else:
                raise CannotRebuild(f"{node.name} calls the module {node.target}")

    def _call(self, node: Node, kind: str, target: str) -> str:
        words = [repr(node.name), target, *map(self._literal, node.args)]
        words += [f"{key}={self._literal(value)}" for key, value in node.kwargs.items()]
        name = self._variable(node, node.name)
        return f"{name} = graph.{kind}({', '.join(words)})"

    def _attribute(self, gm: GraphModule, node: Node) -> Iterator[str]:
        """A constant tensor, or a graph of its own."""
        found: Any = gm
        for part in str(node.target).split("."):
            found = getattr(found, part)
        name = self._variable(node, node.name)
        if isinstance(found, GraphModule):
            inner = self._variable(found, f"{name}_graph")
            yield f"with graph.inner({node.name!r}) as {inner}:"
            for each in found.graph.nodes:
                if each.op == "placeholder":
                    place = self._variable(each, each.name)
                    yield f"    {place} = graph.placeholder({each.name!r})"
            yield from (f"    {text}" for text in self._calls(found, found.graph.nodes))
            yield f"{name} = {inner}.node"
        elif isinstance(found, Tensor):
            shape, stride = (self._literal(tuple(x)) for x in (found.shape, found.stride()))
            words = [repr(node.name), str(found.dtype), shape, stride, repr(str(found.device))]
            yield f"{name} = graph.constant({', '.join(words)})"
        else:
            raise CannotRebuild(f"{node.name} is a {type(found).__name__}")

    def _named(self, target: Callable[..., Any], user: str) -> str:
        """The expression that a function is found by."""
        unknown = CannotRebuild(f"{user} calls {target!r}, which no name leads to")
        try:
            name = _get_qualified_name(target)
        except (AttributeError, RuntimeError) as error:
            raise unknown from error
        name = re.sub(r"^_operator\.", "operator.", name)
        if "." not in name:
            name = f"builtins.{name}"
        module, *rest = name.split(".")
        try:
            found: Any = importlib.import_module(module)
        except ImportError as error:
            raise unknown from error
        needed = module
        for part in rest:
            module = f"{module}.{part}"
            found = getattr(found, part, None)
            # Modules of C++ are there without an import, and have no spec.
            if getattr(sys.modules.get(module), "__spec__", None) is not None:
                needed = module
        if found is not target and found != target:
            raise unknown
        self.modules.add(needed)
        return name

    # ------------------------------------------------------------ words

    def _variable(self, key: Any, name: str) -> str:
        """A name of its own for a thing."""
        free, count = name, 0
        while free in self._taken:
            count += 1
            free = (
                f"{name}_{count}" if name in ("pool", "state", "memory") else f"{name}{'_' * count}"
            )
        self._taken.add(free)
        self._of[key] = free
        return free

    def _literal(self, value: Any) -> str:
        """An argument as Python."""
        if isinstance(value, Node):
            return self._of[value]
        if value is Ellipsis:
            return "..."
        if isinstance(value, float):
            return repr(value) if math.isfinite(value) else f'float("{value}")'
        if isinstance(value, torch.SymInt):
            return self._expression(value)
        if type(value) in _PLAIN:
            return repr(value)
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return str(value)
        if isinstance(value, torch.device):
            return f"graph.device({str(value)!r})"
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            return f"slice({', '.join(map(self._literal, parts))})"
        if isinstance(value, dict):
            pairs = (f"{self._literal(k)}: {self._literal(v)}" for k, v in value.items())
            return f"{{{', '.join(pairs)}}}"
        if isinstance(value, list):
            return f"[{', '.join(map(self._literal, value))}]"
        if isinstance(value, tuple) and type(value) in (tuple, torch.Size):
            inner = ", ".join(map(self._literal, value))
            return f"({inner},)" if len(value) == 1 else f"({inner})"
        if callable(value):
            return self._named(value, "an argument")
        raise CannotRebuild(f"an argument is a {type(value).__name__}")

    def _expression(self, value: torch.SymInt) -> str:
        text = str(value.node.expr)
        words = set(re.findall(r"[A-Za-z_]\w*", text))
        if words - self._symbols.keys() or not re.fullmatch(r"[\w\s+*/()-]+", text):
            raise CannotRebuild(f"a size is {text}")
        return re.sub(r"[A-Za-z_]\w*", lambda found: self._symbols[found[0]], text)


def _hint(size: torch.SymInt, symbol: Any) -> int:
    """What a symbol was when the graph was traced."""
    node = size.node
    if node.expr != symbol:
        node = node.shape_env.create_symintnode(symbol, hint=None).node
    return int(node.hint)


def _memory(x: Tensor) -> int:
    """What tells one piece of memory from another."""
    return id(x) if isinstance(x, FakeTensor) else x.untyped_storage()._cdata


def _is_part(x: Tensor) -> bool:
    return not isinstance(x, FakeTensor) and x.untyped_storage().nbytes() > x.nbytes
