"""Checks of a program against itself (structure) and against the one it came from (numbers)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .edit import fake_mode, infer, same_size
from .errors import PassBroke
from .interpret import run
from .program import Node, Program
from .text import dtype_text, excerpt, value_names


def check_structure(program: Program, before: Program | None = None, blame: str = "") -> None:
    """Raise PassBroke unless the graph is well formed and every new value has the shape it claims.

    before: the program a pass started from; values that both have, with unchanged arguments, are
    trusted. blame: the name of the pass, for the message.
    """
    _check_order(program, blame)
    _check_weights(program, blame)
    trusted = _unchanged(program, before) if before is not None else set[str]()
    mode = fake_mode(program.graph)
    for node in program.graph.nodes:
        if node.op == "call_function" and node.name not in trusted:
            _check_value(node, mode, blame)
    if before is not None:
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


def _unchanged(program: Program, before: Program) -> set[str]:
    """Names of nodes that stand in both graphs with the same operator and arguments."""
    old = {node.name: node for node in before.graph.nodes}
    same: set[str] = set()
    for node in program.graph.nodes:
        other = old.get(node.name)
        if other is not None and other.target == node.target and _arguments_equal(node, other):
            same.add(node.name)
    return same


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
    if isinstance(computed, Tensor) and isinstance(claimed, Tensor):
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


@dataclass(frozen=True)
class Deviation:
    """How far a touched value of the new program lies from the old one.

    number: the rewrite (0: an output of the program). incoming, outgoing: relative error
    ||x - r|| / ||r|| against the float64 run r of the incoming program. wide: the same for a
    float64 run of the outgoing program, which no rounding excuses. limit: what was allowed.
    """

    number: int
    before: str
    after: str
    module: str
    incoming: float
    outgoing: float
    wide: float
    limit: float
    broken: bool


WIDE_LIMIT = 1e-7
"""Allowed relative difference of the float64 runs: constants that a model rounded to float32
(1 / sqrt(2), scales) may be re-rounded by a rewrite, functions may not change."""


class Yardstick:
    """The incoming program's values on the probes, natively and in float64, at chosen nodes."""

    def __init__(self, program: Program, probes: Sequence[Sequence[Any]], exact: bool) -> None:
        self.program, self.probes, self.exact = program, probes, exact
        self._native: dict[str, list[Any]] = {}
        self._wide: dict[str, list[Any]] = {}

    def compare(
        self, outgoing: Program, pairs: Sequence[tuple[int, str, str]], growth: float
    ) -> list[Deviation]:
        """Deviations at (number, old name, new name) pairs and at the outputs, in graph order."""
        pairs = [*self._present(outgoing, pairs), *self._output_pairs(outgoing)]
        self._measure({old for _, old, _ in pairs})
        wanted = {new for _, _, new in pairs}
        native = _watched(outgoing, self.probes, wanted, float64=False)
        wide = {} if self.exact else _watched(outgoing, self.probes, wanted, float64=True)
        order = {node.name: place for place, node in enumerate(outgoing.graph.nodes)}
        modules = {node.name: node.meta.get("module", "") for node in outgoing.graph.nodes}
        found = [
            self._deviation(number, old, new, native, wide, growth, modules.get(new, ""))
            for number, old, new in pairs
        ]
        return sorted(found, key=lambda d: order[d.after])

    def _present(
        self, outgoing: Program, pairs: Iterable[tuple[int, str, str]]
    ) -> list[tuple[int, str, str]]:
        old = {n.name for n in self.program.graph.nodes if n.op == "call_function"}
        new = {n.name for n in outgoing.graph.nodes if n.op == "call_function"}
        return [pair for pair in pairs if pair[1] in old and pair[2] in new]

    def _output_pairs(self, outgoing: Program) -> list[tuple[int, str, str]]:
        return [
            (0, a.name, b.name)
            for a, b in zip(self.program.results, outgoing.results, strict=True)
            if isinstance(a, Node) and isinstance(b, Node)
            if a.op == "call_function" and b.op == "call_function"
        ]

    def _measure(self, names: set[str]) -> None:
        missing = names - set(self._native)
        if missing:
            self._native |= _watched(self.program, self.probes, missing, float64=False)
            if not self.exact:
                self._wide |= _watched(self.program, self.probes, missing, float64=True)

    def _deviation(
        self,
        number: int,
        old: str,
        new: str,
        native: dict[str, list[Any]],
        wide: dict[str, list[Any]],
        growth: float,
        module: str,
    ) -> Deviation:
        if self.exact:
            same = all(map(_identical, self._native[old], native[new]))
            error = 0.0 if same else _worst(self._native[old], native[new])
            return Deviation(number, old, new, module, 0.0, error, 0.0, 0.0, not same)
        reference = self._wide[old]
        incoming, outgoing = _worst(reference, self._native[old]), _worst(reference, native[new])
        drift = _worst(reference, wide[new])
        limit = max(growth * incoming, 16 * _epsilon(self._native[old]))
        broken = not (outgoing <= limit and drift <= WIDE_LIMIT)
        return Deviation(number, old, new, module, incoming, outgoing, drift, limit, broken)


def _watched(
    program: Program, probes: Sequence[Sequence[Any]], names: set[str], *, float64: bool
) -> dict[str, list[Any]]:
    values: dict[str, list[Any]] = {name: [] for name in names}

    def keep(node: Node, value: Any) -> None:
        if node.name in values:
            values[node.name].append(value)

    for probe in probes:
        run(program, probe, float64=float64, watch=keep)
    return values


def _identical(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        same = (a == b) | ((a != a) & (b != b))
        return bool(same.all())
    return bool(a == b)


def _worst(reference: Sequence[Any], values: Sequence[Any]) -> float:
    return max((_relative(r, v) for r, v in zip(reference, values, strict=True)), default=0.0)


def _relative(reference: Any, value: Any) -> float:
    """||value - reference|| / ||reference||; infinities and NaNs must stand in the same places."""
    if not isinstance(reference, Tensor) or not isinstance(value, Tensor):
        return 0.0 if reference == value else float("inf")
    if reference.shape != value.shape:
        if reference.numel() != value.numel() or reference.squeeze().shape != value.squeeze().shape:
            return float("inf")
        value = value.reshape(reference.shape)
    if not reference.is_floating_point():
        return 0.0 if torch.equal(reference, value.to(reference.dtype)) else float("inf")
    a, b = reference.double(), value.double()
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return float("inf")
    a, b = a[finite], b[finite]
    scale = float(a.norm())
    gap = float((a - b).norm())
    return gap / scale if scale else gap


def _epsilon(values: Sequence[Any]) -> float:
    kinds = [v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    return max((torch.finfo(kind).eps for kind in kinds), default=0.0)
