"""The two spellings of attention, read into one description.

The composite call (scaled_dot_product_attention), and products around a softmax over keys.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..ir.edit import same_shape, same_size, shape, value_of
from ..ir.pattern import bound_arguments
from ..ir.program import Node
from .attention_einsum import score_product, value_product
from .attention_operands import Operand, operand, turned_operand, ungrouped, unscaled
from .attention_scores import COPIES, PRODUCTS, Unreadable, read_scores
from .prove_mask import Masking

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
SOFTMAXES = (aten.softmax.int, aten._softmax.default, aten.special_softmax.default)
_DROPOUTS = (aten.dropout.default, aten.native_dropout.default)
_PASSING = (*COPIES, *_DROPOUTS, operator.getitem, aten.slice.Tensor, aten.reshape.default)

Number = Callable[[Any], float | None]


@dataclass
class Attention:
    """An attention as it was found. root: its result, of shape [batch, heads, queries, channels],

    or with batch and heads joined (`joined`), without heads (`single`), or with axes in another
    order (`order`). factors: values [.., queries or 1, 1] that multiply (or, if true, divide) the
    queries. floor: the least that a masked score is let be.
    """

    root: Node
    q: Operand
    k: Operand
    v: Operand
    scale: float
    softcap: float = 0.0
    causal: bool = False
    maskings: tuple[Masking, ...] = ()
    sinks: Node | None = None
    single: bool = False
    joined: bool = False
    order: tuple[int, ...] = ()
    factors: tuple[tuple[Node, bool], ...] = ()
    floor: float | None = None


def read_sdpa(node: Node, number: Number) -> Attention:
    """The composite call; raises Unreadable."""
    a = bound_arguments(node)
    if a["dropout_p"]:
        raise Unreadable(f"dropout is active (p={a['dropout_p']:g})")
    q, k, v = (Operand(a[n], tuple(shape(a[n]))) for n in ("query", "key", "value"))
    if len(q.sizes) not in (3, 4):
        raise Unreadable(f"its queries have {len(q.sizes)} axes")
    if a["is_causal"] and not same_size(q.sizes[-2], k.sizes[-2]):
        raise Unreadable("its causal mask starts at the first key, and keys outnumber queries")
    scale = a["scale"] if a["scale"] is not None else 1.0 / math.sqrt(q.sizes[-1])
    maskings: tuple[Masking, ...] = ()
    if a["attn_mask"] is not None:
        mask: Node = a["attn_mask"]
        boolean = value_of(mask).dtype == torch.bool
        space = len(shape(node))
        maskings = (Masking(mask, fill=-math.inf if boolean else None, space=space),)
    found = Attention(
        node, q, k, v, scale, causal=a["is_causal"], maskings=maskings, single=len(q.sizes) == 3
    )
    return _settled(found, number)


def read_softmax(node: Node, number: Number) -> Attention | None:
    """Products around a softmax; None where no product follows, else raises Unreadable."""
    path = path_to_product(node)
    if path is None:
        _refuse_changed_weights(node)
        return None
    *inside, root = path
    rank, axis = len(shape(node)), int(bound_arguments(node)["dim"])
    if axis % rank != rank - 1:
        raise Unreadable(f"its softmax runs over axis {axis % rank} of {rank}, not over the last")
    _refuse_dropout(inside)
    scores = read_scores(node.args[0], number)  # type: ignore[arg-type]
    _refuse_readers([*scores.interior, *inside], root)
    _check_slices(inside, scores.sinks is not None)
    q, k = _score_operands(scores.product, number)
    v, order = _values(root, inside[-1])
    found = Attention(
        root, q, k, v, scores.scale, scores.softcap, False, tuple(scores.maskings), scores.sinks
    )
    found.order, found.factors, found.floor = order, tuple(scores.factors), scores.floor
    found.joined = v.joined
    found.single = all(len(x.sizes) == 3 for x in (q, k, v)) and len(shape(root)) == 3
    return _settled(found, number)


def path_to_product(node: Node) -> list[Node] | None:
    """From attention weights to the product with values: what lies between, and the product."""
    for reader in node.users:
        if _weighs(reader, node):
            return [node, reader]
    for reader in node.users:
        if reader.target in _PASSING and reader.args[0] is node:
            rest = path_to_product(reader)
            if rest is not None:
                return [node, *rest]
    return None


def _refuse_changed_weights(node: Node) -> None:
    """Raise where weights of all keys meet values only after something else was done to them."""
    for changed in node.users:
        if changed.target in (*COPIES, *_DROPOUTS):
            _refuse_changed_weights(changed)
        pointwise = torch.Tag.pointwise in getattr(changed.target, "tags", ())
        if not pointwise or len(shape(changed)) < 3 or not same_shape(changed, node):
            continue
        if any(_weighs(reader, changed) for reader in changed.users):
            name = str(changed.target).split(".")[1]
            raise Unreadable(f"its weights pass through {name} before they meet the values")


def _weighs(reader: Node, weights: Node) -> bool:
    if reader.target is aten.einsum.default:
        return weights in reader.args[1]  # type: ignore[operator]
    if reader.target is aten.baddbmm.default or reader.target not in PRODUCTS:
        return False
    return reader.args[0] is weights and reader.args[1] is not weights


def _refuse_dropout(inside: list[Node]) -> None:
    for node in inside:
        if node.target in _DROPOUTS:
            a = bound_arguments(node)
            if a["train"] is not False and a["p"]:
                raise Unreadable(f"dropout is active (p={a['p']:g})")


def _refuse_readers(interior: list[Node], root: Node) -> None:
    known = {*interior, root}
    for node in interior:
        for reader in node.users:
            if reader not in known:
                what = "an output" if reader.op == "output" else f"%{reader.name}"
                where = "softmax" if node.target in SOFTMAXES else "scores"
                raise Unreadable(f"a second reader, {what}, uses the {where}")


def _check_slices(inside: list[Node], sinks: bool) -> None:
    """The column of the sinks is cut off after the softmax, and nothing else is."""
    cuts = [node for node in inside if node.target is aten.slice.Tensor]
    if len(cuts) != int(sinks):
        raise Unreadable("its weights are cut" if cuts else "its sinks take part in the values")
    for node in cuts:
        a = bound_arguments(node)
        rank = len(shape(node))
        width, kept = shape(a["self"])[-1], shape(node)[-1]
        whole = a["dim"] % rank == rank - 1 and a["start"] in (0, None) and a["step"] == 1
        if not whole or not same_size(kept + 1, width):
            raise Unreadable("its weights are cut elsewhere than at the sinks")


def _score_operands(product: Node, number: Number) -> tuple[Operand, Operand]:
    if product.target is aten.einsum.default:
        words = score_product(str(product.args[0]))
        if words is None:
            raise Unreadable(f"its scores are einsum {product.args[0]}")
        pair: Any = product.args[1]
        q = _ordered(pair[words.first], words.first_order)
        return q, _ordered(pair[words.second], words.second_order)
    left, right = (1, 2) if product.target is aten.baddbmm.default else (0, 1)
    queries: Any = product.args[left]
    keys: Any = product.args[right]
    if len(shape(queries)) != len(shape(keys)):
        raise Unreadable("its queries and keys differ in their number of axes")
    return operand(queries, number), turned_operand(keys, number)


def _values(root: Node, weights: Node) -> tuple[Operand, tuple[int, ...]]:
    if root.target is aten.einsum.default:
        pair: Any = root.args[1]
        words = value_product(str(root.args[0]), pair.index(weights))
        if words is None:
            raise Unreadable(f"its values are weighed by einsum {root.args[0]}")
        order = () if words.out == tuple(range(len(words.out))) else words.out
        return _ordered(pair[words.second], words.second_order), order
    values: Any = root.args[1]
    return operand(values, _unknown), ()


def _unknown(value: Any) -> float | None:
    """No number is known: scales on values stay, they do not belong to the scores."""
    return None


def _ordered(node: Node, order: tuple[int, ...]) -> Operand:
    found = Operand(node, tuple(shape(node)))
    if order == tuple(range(len(order))):
        return found
    sizes = tuple(shape(node)[axis] for axis in order)
    return found.then(aten.permute.default, list(order), sizes=sizes)


def _settled(found: Attention, number: Number) -> Attention:
    """With an axis of heads, grouped heads ungrouped, and all scales in one number."""
    if found.single:
        found.q, found.k, found.v = (_with_heads(x) for x in (found.q, found.k, found.v))
    ranks = {len(x.sizes) for x in (found.q, found.k, found.v)}
    if ranks != {4}:
        raise Unreadable(f"its operands have {' and '.join(map(str, sorted(ranks)))} axes")
    k, v = ungrouped(found.k), ungrouped(found.v)
    if k is not None and v is not None and k.sizes[1] == v.sizes[1]:
        found.k, found.v = k, v
    found.q, found.k = unscaled(found.q, number), unscaled(found.k, number)
    found.scale *= found.q.factor * found.k.factor
    _check(found)
    return found


def _with_heads(x: Operand) -> Operand:
    batch, *rest = x.sizes
    return x.then(aten.unsqueeze.default, 1, sizes=(batch, 1, *rest))


def _check(found: Attention) -> None:
    q, k, v = found.q.sizes, found.k.sizes, found.v.sizes
    heads, groups = q[1], k[1]
    if not isinstance(heads, int) or not isinstance(groups, int) or v[1] != groups:
        raise Unreadable(f"it has {heads} query heads, {groups} key heads and {v[1]} value heads")
    if heads % groups:
        raise Unreadable(f"its {heads} query heads do not divide into {groups} groups")
    if not (same_size(q[0], k[0]) and same_size(k[0], v[0]) and same_size(k[2], v[2])):
        raise Unreadable("its queries, keys and values differ in batch or length")
    if not math.isfinite(found.scale):
        raise Unreadable(f"its scale is {found.scale}")
    dtypes = {value_of(x.base).dtype for x in (found.q, found.k, found.v)}
    if dtypes != {value_of(found.root).dtype}:
        names = sorted(str(d).removeprefix("torch.") for d in dtypes)
        raise Unreadable(f"it reads {' and '.join(names)} but gives {value_of(found.root).dtype}")
