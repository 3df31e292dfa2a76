"""Attention by hand: a product, a scale, masks, a softmax, a product.

The walk goes backwards from the second product. What it does not know it steps over and keeps
as the attention's problem, so that an attention with a cache is refused with a reason, and one
without is none of our business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from . import products
from .attention import Attention
from .nodes import arguments, first_argument, mutates, op_name, tensor
from .sites import Mask, Refused

_COPIES = frozenset({
    "to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "detach",
})  # fmt: skip
_ADD = frozenset({"add", "iadd", "add_"})
_MULTIPLY = frozenset({"mul", "imul", "mul_", "multiply", "multiply_"})
_DIVIDE = frozenset({"truediv", "itruediv", "div", "div_", "divide", "divide_", "true_divide"})
_BARRIERS = frozenset({"matmul", "einsum", "scaled_dot_product_attention"})
_FAR = 24  # operations between two products that are still one attention
_HIDDEN = -1e9  # added to any logit, a weight of zero


def recognise(node: Node) -> Attention | None:
    """The attention a node computes, None if it computes something else."""
    out = products.weighted(node)
    if out is None or not _leads(out.left, _is_softmax):
        return None
    walk = _Walk(node)
    softmax = walk.to_softmax(out.left)
    product = None if softmax is None else walk.to_scores(softmax)
    if product is None:
        return None
    walk.check_users()
    return Attention(
        node=node,
        query=product.left,
        key=product.right,
        value=out.right,
        masks=tuple(reversed(walk.masks)),
        dropout=walk.dropout,
        scale=walk.scale,
        spelling="einsum" if op_name(node) == "einsum" else "matmul",
        inner=tuple(sorted(walk.inner, reverse=True)),
        key_axes=product.right_axes,
        value_axes=out.right_axes,
        query_order=product.order,
        output_order=out.order,
        problem=walk.problem,
    )


class _Walk:
    """What is met on the way back, in the order it is met."""

    def __init__(self, end: Node) -> None:
        self.end = end
        self.inner: list[Node] = []
        self.masks: list[Mask] = []
        self.dropout: Any = 0.0
        self.scale: Any = 1.0
        self.problem: Refused | None = None
        self._weights = 0

    def to_softmax(self, node: Node) -> Node | None:
        """From the weights to what the softmax is taken of."""
        while len(self.inner) < _FAR:
            node = self._take(node)
            name = op_name(node)
            following = self._next(node, _is_softmax)
            if name == "softmax":
                self._softmax(node)
                self._weights = len(self.inner)
                return first_argument(node)
            if name == "dropout":
                self._dropout(node)
            elif name not in _COPIES:
                self._refuse("weights", f"`{node.name}` ({name}) changes the attention weights")
            if following is None:
                return None
            node = following
        return None

    def to_scores(self, node: Node) -> products.Product | None:
        """From what the softmax is taken of to the product of queries and keys."""
        while len(self.inner) < 2 * _FAR:
            node = self._take(node)
            product = products.scores(node)
            if product is not None:
                return product
            following = self._next(node, _is_scores)
            if following is None:
                return None
            if not self._understands(node, following):
                self._refuse(
                    "scores",
                    f"`{node.name}` ({op_name(node)}) changes the scores before the softmax",
                )
            node = following
        return None

    def check_users(self) -> None:
        """Keep as a problem that something else sees scores or weights."""
        own = {*self.inner, self.end}
        for place, node in enumerate(self.inner):
            for user in node.users:
                if user in own:
                    continue
                code, what = ("weights", "The attention weights")
                if place >= self._weights:
                    code, what = ("scores", "The attention scores")
                does = "are returned" if user.op == "output" else f"are also used by `{user.name}`"
                self._refuse(code, f"{what} `{node.name}` {does}")

    def _take(self, node: Node) -> Node:
        """The node, or the last in-place operation on it before it was read; now one of ours."""
        reader = self.inner[-1] if self.inner else self.end
        writes = [x for x in node.users if mutates(x, node) and x < reader and x not in self.inner]
        self.inner.append(max(writes, default=node))
        return self.inner[-1]

    def _next(self, node: Node, goal: Callable[[Node], bool]) -> Node | None:
        first = first_argument(node)
        if first is not None and mutates(node, first):
            return first
        return next((x for x in node.all_input_nodes if _leads(x, goal)), None)

    def _softmax(self, node: Node) -> None:
        dim = arguments(node, "self dim", dim=None)["dim"]
        if dim not in (-1, 3):
            self._refuse("scores", f"`{node.name}` is a softmax along axis {dim}, not the slots")

    def _dropout(self, node: Node) -> None:
        call = arguments(node, "self p training", p=0.5, training=True)
        if call.get("train", call["training"]) is not False:
            self.dropout = call["p"]

    def _understands(self, node: Node, scores: Node) -> bool:
        """Take in a mask or a scale; False for what is neither."""
        name = op_name(node)
        if name in _COPIES:
            return True
        if name in _ADD:
            return self._add(node, scores)
        if name in ("masked_fill", "masked_fill_"):
            call = arguments(node, "self mask value")
            return call["self"] is scores and self._hide(call["mask"], "hide", call["value"], node)
        if name == "where":
            names = "self condition other" if node.op == "call_method" else "condition self other"
            call = arguments(node, names)
            form, fill = ("keep", "other") if call["self"] is scores else ("hide", "self")
            return self._hide(call["condition"], form, call[fill], node)
        if name in _MULTIPLY or name in _DIVIDE:
            return self._multiply(node, scores, name in _DIVIDE)
        return False

    def _add(self, node: Node, scores: Node) -> bool:
        call = arguments(node, "self other", alpha=1)
        first, second = call["self"], call["other"]
        mask = second if first is scores else first
        fake = tensor(mask)
        if fake is None or mask is scores or call["alpha"] != 1:
            return False
        if not fake.dtype.is_floating_point:
            self._refuse(
                "mask-dtype",
                f"The mask `{mask.name}` of {fake.dtype} is added to the scores as a number, "
                "which hides nothing; masked_fill is meant",
            )
        if self.scale != 1:
            self._refuse("mask-scaled", f"The mask `{mask.name}` is scaled with the scores")
        self.masks.append(Mask(mask, "add"))
        return True

    def _hide(self, mask: Any, form: str, fill: Any, node: Node) -> bool:
        fake, value, scores = tensor(mask), _number(fill), tensor(node)
        if fake is None or fake.dtype != torch.bool or scores is None or value is None:
            return False
        limit = max(torch.finfo(scores.dtype).min / 2, _HIDDEN)
        if isinstance(self.scale, Node) or not value * self.scale <= limit:
            self._refuse(
                "mask-value",
                f"`{node.name}` sets hidden scores to {value}, which leaves them a weight; "
                "-inf is meant",
            )
        self.masks.append(Mask(mask, form))
        return True

    def _multiply(self, node: Node, scores: Node, divides: bool) -> bool:
        call = arguments(node, "self other", rounding_mode=None)
        first, second = call["self"], call["other"]
        if call["rounding_mode"] is not None or (divides and first is not scores):
            return False
        other = second if first is scores else first
        number = _number(other)
        if number is None or number == 0:
            self.scale = other
            return isinstance(other, Node) and other is not scores
        if not isinstance(self.scale, Node):
            self.scale *= 1 / number if divides else number
        return True

    def _refuse(self, code: str, what: str) -> None:
        """Keep the first problem."""
        if self.problem is None:
            self.problem = Refused(
                code, f"{what}; the pass replaces softmax(q k^T scale + mask) v and nothing else."
            )


def _is_softmax(node: Node) -> bool:
    return op_name(node) == "softmax"


def _is_scores(node: Node) -> bool:
    return products.scores(node) is not None


def _leads(node: Node, goal: Callable[[Node], bool]) -> bool:
    """Whether the goal is behind a node, through tensors of four axes and no other product."""
    seen: set[Node] = set()
    pending = [node]
    while pending and len(seen) < _FAR:
        node = pending.pop()
        fake = tensor(node)
        if node in seen or fake is None or fake.dim() != 4:
            continue
        seen.add(node)
        if goal(node):
            return True
        if not (_is_softmax(node) or op_name(node) in _BARRIERS):
            pending += node.all_input_nodes
    return False


def _number(given: Any) -> float | None:
    """A literal number, also as a tensor made of one."""
    while isinstance(given, Node) and op_name(given) in _COPIES:
        given = first_argument(given)
    if isinstance(given, Node):
        if op_name(given) in ("tensor", "scalar_tensor"):
            given = given.args[0]
        elif op_name(given) in ("full", "full_like"):
            given = arguments(given, "size fill_value").get("fill_value")
    if isinstance(given, bool) or not isinstance(given, int | float):
        return None
    return float(given)
