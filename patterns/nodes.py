"""Small questions about fx nodes, asked in the same words everywhere.

Sizes may be symbolic. Comparing two SymInts with `==` inside an `if` would add a guard to the
model being compiled, so every comparison goes through `known`, which never guards and answers
False when it cannot tell.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

Int: TypeAlias = int | torch.SymInt

# Operations whose result shares memory with their first argument, whatever the strides; others
# (reshape, contiguous, to, ...) may share it, so they are here as well.
# fmt: off
ALIASING = frozenset({
    "chunk", "contiguous", "detach", "diagonal", "expand", "expand_as", "flatten", "getattr",
    "getitem", "movedim", "narrow", "permute", "reshape", "select", "split", "squeeze", "swapaxes",
    "swapdims", "t", "to", "transpose", "type", "type_as", "unbind", "unflatten", "unsqueeze",
    "view", "view_as",
})
# What `x[i] = y`, `x += y`, ... are traced to.
IN_PLACE_OPERATORS = frozenset({
    "setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior",
    "ixor", "ilshift", "irshift", "imatmul",
})
# fmt: on


def op_name(node: Node) -> str:
    """ "reshape" for `x.reshape(...)` and for `torch.reshape(x, ...)` alike, "" if not a call."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    target = node.target
    name = getattr(target, "__name__", str(target))
    # A function of the user's own, put into the graph whole, says nothing by its bare name.
    if isinstance(target, FunctionType) and not target.__module__.startswith("torch"):
        return f"{target.__module__}.{name}"
    return name


def arguments(node: Node, names: str, **defaults: Any) -> dict[str, Any]:
    """The call's arguments by name, given the names in positional order."""
    bound = {**defaults, **dict(zip(names.split(), node.args, strict=False)), **node.kwargs}
    if "input" in bound:  # torch.f(input, ...) is tensor.f(...) with another word for self
        bound["self"] = bound.pop("input")
    return bound


def first_argument(node: Node) -> Node | None:
    """The tensor a method is called on, or a function's first argument."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if isinstance(first, Node) else None


def tensor(node: Any) -> torch.Tensor | None:
    """The fake tensor Dynamo recorded for a node, None if the node is not a tensor."""
    example = node.meta.get("example_value") if isinstance(node, Node) else None
    return example if isinstance(example, torch.Tensor) else None


def recorded(node: Node) -> torch.Tensor:
    """The fake tensor of a node that has been found to be a tensor before."""
    found = tensor(node)
    if found is None:
        raise TypeError(f"{node.name} is not a tensor")
    return found


def integer(argument: Any) -> Int | None:
    """The integer behind an argument: a literal, or a node that holds an int or a SymInt."""
    if isinstance(argument, Node):
        argument = argument.meta.get("example_value")
    if isinstance(argument, bool) or not isinstance(argument, int | torch.SymInt):
        return None
    return argument


def constant(size: Int) -> int | None:
    """A size as a plain number, also where a symbol is left that has only one value."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def known(condition: bool | torch.SymBool) -> bool:
    """True if the condition holds for every value its symbols may take."""
    return statically_known_true(condition)


def same(left: Int | None, right: Int | None) -> bool:
    """True if two sizes are known to be equal."""
    return left is not None and right is not None and known(left == right)


def same_shape(left: Any, right: Any) -> bool:
    """True if two shapes are known to be equal."""
    return len(left) == len(right) and all(map(same, left, right))


def mutates(node: Node, operand: Node) -> bool:
    """True if the node writes into `operand` in place."""
    if node.kwargs.get("out") is operand:
        return True
    return _is_in_place(node) and first_argument(node) is operand


def base(node: Node) -> Node:
    """The tensor whose memory a node may share."""
    while op_name(node) in ALIASING and (inner := first_argument(node)) is not None:
        node = inner
    return node


def _is_in_place(node: Node) -> bool:
    name = op_name(node)
    if getattr(node.target, "__module__", None) == "_operator":
        return name in IN_PLACE_OPERATORS  # `operator.and_` is named for not being a keyword
    return name.endswith("_") and not name.endswith("__")


def mutations(node: Node) -> list[Node]:
    """Every in-place write to a tensor, through the tensor itself or through a view of it."""
    found = []
    for user in node.users:
        if mutates(user, node):
            found.append(user)
        elif op_name(user) in ALIASING and first_argument(user) is node:
            found += mutations(user)
    return found
