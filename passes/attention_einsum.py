"""The two products of attention written as einsum: which letter is batch, head, query, key."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """Operands by their place in the einsum, and the axis orders that bring them into form.

    first: the left one (queries, or weights), second: keys or values; out: from the form
    [*batch, rows, columns] to the einsum's own result.
    """

    first: int
    second: int
    first_order: tuple[int, ...]
    second_order: tuple[int, ...]
    out: tuple[int, ...]


def _letters(equation: str) -> tuple[str, str, str] | None:
    left, arrow, out = equation.replace(" ", "").partition("->")
    operands = left.split(",")
    if not arrow or len(operands) != 2 or "." in equation:
        return None
    a, b = operands
    distinct = all(len(set(word)) == len(word) for word in (a, b, out))
    return (a, b, out) if distinct and set(out) <= set(a) | set(b) else None


def score_product(equation: str) -> Product | None:
    """For `bqhd,bkhd->bhqk`: queries [*batch, q, d] and keys [*batch, k, d]; None if it is not."""
    words = _letters(equation)
    if words is None:
        return None
    out = words[2]
    rows, columns, batch = out[-2], out[-1], out[:-2]
    first, second = (0, 1) if rows in words[0] else (1, 0)
    queries, keys = words[first], words[second]
    summed = set(queries) & set(keys) - set(out)
    if len(summed) != 1 or rows in keys or columns in queries:
        return None
    channel = summed.pop()
    if set(queries) != {*batch, rows, channel} or set(keys) != {*batch, columns, channel}:
        return None
    return Product(
        first,
        second,
        tuple(queries.index(x) for x in (*batch, rows, channel)),
        tuple(keys.index(x) for x in (*batch, columns, channel)),
        tuple(range(len(out))),
    )


def value_product(equation: str, weights: int) -> Product | None:
    """For `bhqk,bkhd->bqhd`: weights as they are, values [*batch, k, d], and the result's order.

    weights: the place of the attention weights among the operands.
    """
    words = _letters(equation)
    if words is None:
        return None
    first, second, out = words[weights], words[1 - weights], words[2]
    batch, rows, columns = first[:-2], first[-2], first[-1]
    rest = set(second) - {*batch, columns}
    if len(rest) != 1 or rows in second or columns in out or columns not in second:
        return None
    channel = rest.pop()
    form = (*batch, rows, channel)
    if set(second) != {*batch, columns, channel} or set(out) != set(form):
        return None
    return Product(
        weights,
        1 - weights,
        tuple(range(len(first))),
        tuple(second.index(x) for x in (*batch, columns, channel)),
        tuple(form.index(x) for x in out),
    )
