"""Checks of a program against itself (structure) and against the one it came from (numbers)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .edit import fake_mode, infer, same_size
from .errors import PassBroke
from .program import Node, Program
from .text import dtype_text, excerpt, value_names
from .yardstick import WIDE_LIMIT, Deviation, Yardstick


def check_structure(
    program: Program, before: Program | None = None, blame: str = "", same_results: bool = True
) -> None:
    """Raise PassBroke unless the graph is well formed and every new value has the shape it claims.

    before: the program a pass started from; values that both have, with unchanged arguments, are
    trusted. blame: the name of the pass, for the message. same_results: whether the outputs must
    have the number and types that they had.
    """
    _check_order(program, blame)
    _check_weights(program, blame)
    trusted = unchanged_nodes(program, before) if before is not None else set[str]()
    mode = fake_mode(program.graph)
    for node in program.graph.nodes:
        if node.op == "call_function" and node.name not in trusted:
            _check_value(node, mode, blame)
    if before is not None and same_results:
        _check_results(program, before, blame)


def _fault(node: Node, blame: str, what: str, expected: str = "", found: str = "") -> PassBroke:
    names = value_names(node.graph)
    who = f"{blame} left the program wrong" if blame else "the program is malformed"
    return PassBroke(
        f"{who}: %{names.get(node, node.name)} {what}\n{excerpt(node)}",
        where=node.meta.get("module", "") or "the root module",
        expected=expected,
        found=found,
        fix="run with verify=numbers to find the single rewrite, or report the pass to its author",
    )


def _check_order(program: Program, blame: str) -> None:
    seen: set[Node] = set()
    for node in program.graph.nodes:
        for read in node.all_input_nodes:
            if read not in seen:
                raise _fault(node, blame, f"reads %{read.name}, which is computed later or gone")
        seen.add(node)


def _check_weights(program: Program, blame: str) -> None:
    for node in program.weight_nodes():
        name, value = str(node.target), node.meta.get("val")
        if name not in program.weights:
            raise _fault(node, blame, f"reads the weight {name}, which does not exist")
        kept = (tuple(program.weights.shape(name)), program.weights.dtype(name))
        if isinstance(value, Tensor) and kept != (tuple(value.shape), value.dtype):
            raise _fault(
                node,
                blame,
                f"does not have the shape or dtype of the weight {name}",
                expected=f"{dtype_text(kept[1])}{list(kept[0])}",
                found=f"{dtype_text(value.dtype)}{list(value.shape)}",
            )


def unchanged_nodes(program: Program, before: Program) -> set[str]:
    """Names of nodes that stand in both graphs with the same operator and typed arguments."""
    old = {node.name: node for node in before.graph.nodes}
    same: set[str] = set()
    for node in program.graph.nodes:
        other = old.get(node.name)
        if other is None or other.op != node.op or other.target != node.target:
            continue
        if _arguments_equal(node, other) and _same_type(node, other):
            reads = zip(node.all_input_nodes, other.all_input_nodes, strict=True)
            if all(_same_type(a, b) for a, b in reads):
                same.add(node.name)
    return same


def _same_type(a: Node, b: Node) -> bool:
    x, y = a.meta.get("val"), b.meta.get("val")
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return type(x) is type(y)
    return x is y or _like(x, y)


def _arguments_equal(a: Node, b: Node) -> bool:
    return str(a.args) == str(b.args) and str(a.kwargs) == str(b.kwargs)


def _check_value(node: Node, mode: Any, blame: str) -> None:
    try:
        computed = infer(node, mode)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
        raise _fault(node, blame, f"cannot be computed: {str(error).splitlines()[0]}") from error
    claimed = node.meta.get("val")
    if isinstance(computed, Tensor) != isinstance(claimed, Tensor):
        raise _fault(node, blame, f"is {type(computed).__name__}, not {type(claimed).__name__}")
    if not isinstance(computed, Tensor) or not isinstance(claimed, Tensor):
        return
    if not _like(computed, claimed):
        raise _fault(
            node,
            blame,
            "does not compute what it claims",
            expected=f"{dtype_text(claimed.dtype)}{list(claimed.shape)}",
            found=f"{dtype_text(computed.dtype)}{list(computed.shape)}",
        )


def _like(a: Tensor, b: Tensor) -> bool:
    """The same dtype and rank, and no size that is provably different."""
    if a.dtype != b.dtype or a.dim() != b.dim():
        return False
    pairs = zip(a.shape, b.shape, strict=True)
    return all(same_size(x, y) or not (isinstance(x, int) and isinstance(y, int)) for x, y in pairs)


def _check_results(program: Program, before: Program, blame: str) -> None:
    old, new = before.results, program.results
    if len(old) != len(new):
        raise _fault(
            program.output, blame, "has other outputs", expected=f"{len(old)}", found=f"{len(new)}"
        )
    for was, is_ in zip(old, new, strict=True):
        a, b = getattr(was, "meta", {}).get("val"), getattr(is_, "meta", {}).get("val")
        if isinstance(a, Tensor) and (not isinstance(b, Tensor) or not _like(b, a)):
            raise _fault(
                program.output,
                blame,
                f"returns %{is_} in the place of %{was}, of another type",
                expected=f"{dtype_text(a.dtype)}{list(a.shape)}",
                found=f"{dtype_text(b.dtype)}{list(b.shape)}" if isinstance(b, Tensor) else "",
            )


__all__ = ["WIDE_LIMIT", "Deviation", "Yardstick", "check_structure", "unchanged_nodes"]
