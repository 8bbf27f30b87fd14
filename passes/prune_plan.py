"""Which weights get which pattern of zeros: the options that all methods of pruning share."""

from __future__ import annotations

import fnmatch
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import PlanishError, WrongOption
from ..ir.history import Measured
from ..ir.program import Program
from ..ir.rewrite import Journal
from ..ir.sparsity_patterns import SCOPES, Sparsity, parse_sparsity
from ..ir.weight_blocks import check_weight
from ..ir.weight_roles import Role, weight_roles
from .contract import Pass, contract
from .layer_patterns import LayerPatterns
from .spared_products import spared

_UNSTRUCTURED = (
    "zeros that may lie anywhere save neither memory nor time on ordinary hardware: the weights "
    "are stored and multiplied as before. Choose 2:4 for half the bytes, or cut channels"
)


class CannotPrune(PlanishError):
    """A weight that was named for pruning has another use that forbids it."""


class PruningSavesNothing(UserWarning):
    """The chosen pattern of zeros makes nothing smaller or faster."""


@dataclass(frozen=True)
class WeightPruner(Pass):
    """Base of the passes that set values of weights to zero.

    sparsity: the share of zeros (50% or 0.5), or N:M along the summed axis: 2:4 keeps two of every
    four. scope: whether a share is the same in each "row" (output), or of the whole "matrix". skip:
    names to leave alone, comma-separated patterns. overrides: of single layers, "PATTERN=SPARSITY;
    PATTERN=none", matched with the weight's name or its module's path; the last match counts.
    heads: prune heads onto the vocabulary and routers, too (`spared_products`). Tables, and heads
    tied to them, stay as they are.
    """

    contract = contract("lossy", requires=["functional", "dense_weights"], min_sqnr=-20.0)
    sparsity: str = "50%"
    scope: str = "row"
    skip: str = ""
    overrides: str = ""
    heads: bool = False

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise WrongOption(
                f"option {self.pass_name()}.scope cannot be {self.scope!r}",
                expected=" or ".join(SCOPES),
                found=repr(self.scope),
                fix=f"choose one of {', '.join(SCOPES)}",
            )
        _ = self.pattern, self._overrides

    def with_options(self, changes: dict[str, Any]) -> Pass:
        """See `Pass`. A number is a share; YAML reads an unquoted 2:4 as 124, to base 60."""
        given = changes.get("sparsity")
        if isinstance(given, int) and given > 60:
            changes = changes | {"sparsity": f"{given // 60}:{given % 60}"}
        elif isinstance(given, (int, float)):
            changes = changes | {"sparsity": f"{given:g}"}
        return super().with_options(changes)

    @property
    def pattern(self) -> Sparsity:
        return parse_sparsity(str(self.sparsity), f"{self.pass_name()}.sparsity")

    @property
    def _overrides(self) -> LayerPatterns:
        found = LayerPatterns.parse(self.overrides, f"{self.pass_name()}.overrides")
        for _, text in found.choices:
            if text != "none":
                parse_sparsity(text, f"{self.pass_name()}.overrides")
        return found

    def planned(self, program: Program, journal: Journal) -> list[tuple[Role, Sparsity]]:
        """The weights to prune and how, in graph order; the others are declined.

        Raises UnknownOption for an override that names nothing, CannotPrune for one that names a
        weight whose other use forbids it.
        """
        roles, overrides = weight_roles(program), self._overrides
        names = [name for role in roles for name in program.weights.names_of(role.name)]
        overrides.check(names, f"option {self.pass_name()}.overrides")
        left = {} if self.heads else spared(roles)
        found = [(r, self._of(program, r, overrides, left.get(r.name), journal)) for r in roles]
        return [(role, pattern) for role, pattern in found if pattern is not None]

    def _of(
        self,
        program: Program,
        role: Role,
        overrides: LayerPatterns,
        left: str | None,
        journal: Journal,
    ) -> Sparsity | None:
        """The pattern of one weight, or None with the reason in the journal."""
        names = program.weights.names_of(role.name)
        choices = [choice for name in names if (choice := overrides.of(name)) is not None]
        hindrance = _hindrance(role)
        if hindrance and _named(overrides, names):
            raise CannotPrune(
                f"{role.name} cannot be pruned",
                where=role.name,
                expected="a weight that only matrix products read, along one axis",
                found=hindrance,
                fix=f"leave {role.name} out of {self.pass_name()}.overrides",
            )
        reason = hindrance
        if any(fnmatch.fnmatch(n, p.strip()) for n in names for p in self.skip.split(",")):
            reason = "named in the option skip"
        elif choices and choices[-1] == "none":
            reason = "set to none by the option overrides"
        elif not reason and not choices and left:
            reason = f"{left}; the option heads is false"
        if reason:
            journal.declined(self.pass_name(), role.name, reason)
            return None
        text = choices[-1] if choices else str(self.sparsity)
        return parse_sparsity(text, f"{self.pass_name()}.sparsity")

    def report(self, journal: Journal, shares: Mapping[str, tuple[Sparsity, int, int]]) -> None:
        """Record how many zeros there are, and warn where they save nothing.

        shares: by weight its pattern, its zeros and its size.
        """
        if not shares:
            return
        zeros = sum(zero for _, zero, _ in shares.values())
        share = zeros / sum(size for _, _, size in shares.values())
        loose = [name for name, (pattern, _, _) in shares.items() if not pattern.structured]
        what = "share of zeros in the pruned weights"
        journal.measured.append(Measured(what, 0.0, share, math.inf))
        if loose:
            what = "weights whose zeros save neither memory nor time on ordinary hardware"
            journal.measured.append(Measured(what, 0.0, len(loose), math.inf, loose[0]))
            message = f"{self.pass_name()}: {_UNSTRUCTURED}"
            warnings.warn(message, PruningSavesNothing, stacklevel=3)


def rows_apart(weight: Tensor, axis: int, where: str) -> Tensor:
    """A weight as rows [rows, in] along its summed axis, float32 (float64 stays).

    Raises UnsupportedShape and NonFiniteWeight.
    """
    from ..ir.composite_format import check_finite, rows_of

    check_weight(weight, axis, where)
    rows = rows_of(weight, axis)
    check_finite(rows, where)
    return rows if rows.dtype == torch.float64 else rows.float()


def note(pattern: Sparsity, zeros: int, size: int, said: str = "") -> str:
    """What was done to one weight, for the journal."""
    idle = "" if pattern.structured else ", which saves nothing on ordinary hardware"
    return f"{pattern.name}: {zeros / size:.1%} zeros{idle}{'; ' if said else ''}{said}"


def _named(overrides: LayerPatterns, names: list[str]) -> bool:
    """Whether an override asks for one of the names itself, not for all that fit a pattern."""
    asked = {pattern for pattern, choice in overrides.choices if choice != "none"}
    return bool(asked & {*names, *(name.rpartition(".")[0] for name in names)})


def _hindrance(role: Role) -> str | None:
    """Why a weight cannot be pruned at all."""
    if role.tables:
        tied = ", tied to the matmul that reads it too" if role.matmuls else ""
        return f"%{role.tables[0].name} looks rows of it up{tied}"
    if not role.matmuls:
        return "no matrix product reads it"
    if role.others:
        return f"%{role.others[0].name} reads it too, which is no matrix product"
    return "its readers sum over different axes" if role.axis is None else None


__all__ = ["CannotPrune", "PruningSavesNothing", "WeightPruner", "note", "rows_apart"]
