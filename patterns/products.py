"""The two products of a hand-written attention: queries by keys, and weights by values."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch.fx import Node

from .attention import IN_ORDER
from .layout import BATCH, CACHE_AXES, DIM, HEAD, SLOT
from .nodes import arguments, op_name, tensor


class Product(NamedTuple):
    """`left` is the queries or the weights, `right` the keys or the values."""

    left: Node
    right: Node
    right_axes: tuple[str, ...]
    order: tuple[int, ...]
    """Of queries, their axes that are batch, head, token, dimension; of weights, which of those
    the axes of the result are."""


def scores(node: Node) -> Product | None:
    """Queries by keys to [B, H, T, S]: `q @ k.transpose(-2, -1)` or an einsum."""
    pair = _matrices(node)
    if pair is not None:
        return Product(*pair, (BATCH, HEAD, DIM, SLOT), IN_ORDER)
    spelled = _einsum(node)
    if spelled is None:
        return None
    (one, other), (left, right), out = spelled
    if out[2] in other:
        one, other, left, right = other, one, right, left
    roles = _roles(out, one, other)
    if roles is None:
        return None
    row, axes = roles
    return Product(left, right, axes, tuple(one.index(letter) for letter in row))


def weighted(node: Node) -> Product | None:
    """Weights [B, H, T, S] by values: `w @ v` or an einsum."""
    pair = _matrices(node)
    if pair is not None:
        return Product(*pair, CACHE_AXES, IN_ORDER)
    spelled = _einsum(node)
    if spelled is None:
        return None
    (one, other), (left, right), out = spelled
    roles = _roles(one, out, other)
    if roles is None:
        return None
    row, axes = roles
    return Product(left, right, axes, tuple(row.index(letter) for letter in out))


def _roles(weights: str, rows: str, cached: str) -> tuple[str, tuple[str, ...]] | None:
    """The letters of batch, head, token and dimension, and what those of `cached` mean.

    `weights` are those of [B, H, T, S]; `rows`, of queries or results, must have the first three
    and a dimension, `cached` must have the slots for the tokens. None for any other product.
    """
    batch, head, token, slot = tuple(weights)
    row = batch + head + token + "".join(set(rows) - set(weights))
    meaning = {batch: BATCH, head: HEAD, slot: SLOT, row[3:]: DIM}
    if set(rows) != set(row) or set(cached) != set(meaning):
        return None
    return row, tuple(meaning[letter] for letter in cached)


def _matrices(node: Node) -> tuple[Node, Node] | None:
    if op_name(node) != "matmul" or len(node.args) + len(node.kwargs) != 2:
        return None
    call = arguments(node, "self other")
    left, right = call.get("self"), call.get("other")
    return (left, right) if _has_four_axes(left) and _has_four_axes(right) else None


def _einsum(node: Node) -> tuple[list[str], tuple[Node, ...], str] | None:
    """The letters of two operands of four axes, the operands, the letters of the result."""
    if op_name(node) != "einsum" or not node.args or not isinstance(node.args[0], str):
        return None
    given: Any = node.args[1:]
    operands = tuple(given[0]) if len(given) == 1 and not isinstance(given[0], Node) else given
    left, arrow, out = node.args[0].replace(" ", "").partition("->")
    letters = left.split(",")
    if not arrow or len(letters) != 2 or len(operands) != 2:
        return None
    if not all(
        len(word) == 4 and len(set(word)) == 4 and word.isalpha() for word in (*letters, out)
    ):
        return None
    return (letters, operands, out) if all(map(_has_four_axes, operands)) else None


def _has_four_axes(node: Any) -> bool:
    fake = tensor(node)
    return fake is not None and fake.dim() == 4
