"""What a pass is, and what it promises."""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from ..ir.errors import UnknownOption, WrongOption
from ..ir.program import Program
from ..ir.rewrite import Journal, Rule, apply_rules


class Fidelity(Enum):
    """EXACT: the same bits. BOUNDED: the same function, rounded otherwise. LOSSY: a budget."""

    EXACT = "exact"
    BOUNDED = "bounded"
    LOSSY = "lossy"


@dataclass(frozen=True)
class Contract:
    """What holds before and after a pass.

    growth: for BOUNDED, how many times the rounding error against float64 may grow at a touched
    value. min_sqnr: for LOSSY, the least signal-to-quantization-noise ratio (dB) of each changed
    weight. requires, ensures, breaks: facts. needs: "calibration" if batches must be given.
    changes_interface: the pass adds inputs or outputs, so it compares the programs itself.
    rounds_weights: for BOUNDED, the pass writes weights that it computed, rounded once; so float64
    runs may differ by as much as is allowed for the program's own rounding.
    """

    fidelity: Fidelity
    requires: frozenset[str] = frozenset()
    ensures: frozenset[str] = frozenset()
    breaks: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    growth: float = 8.0
    min_sqnr: float = 0.0
    changes_interface: bool = False
    rounds_weights: bool = False


def contract(
    fidelity: Fidelity | str,
    *,
    requires: Sequence[str] = (),
    ensures: Sequence[str] = (),
    breaks: Sequence[str] = (),
    needs: Sequence[str] = (),
    growth: float = 8.0,
    min_sqnr: float = 0.0,
    changes_interface: bool = False,
    rounds_weights: bool = False,
) -> Contract:
    """A Contract from plain lists."""
    return Contract(
        Fidelity(fidelity),
        frozenset(requires),
        frozenset(ensures),
        frozenset(breaks),
        frozenset(needs),
        growth,
        min_sqnr,
        changes_interface,
        rounds_weights,
    )


@dataclass
class Context:
    """What a running pass is given: the journal, calibration batches and a progress callback.

    calibration: flat input lists, as `Program.flatten_inputs` lays them out.
    progress: called with (done, total, what).
    """

    journal: Journal
    calibration: list[list[Any]] = field(default_factory=list[list[Any]])
    progress: Callable[[int, int, str], None] = lambda done, total, what: None


class Pass(ABC):
    """A rewrite of programs. Subclasses are frozen dataclasses; their fields are their options."""

    contract: ClassVar[Contract]

    @classmethod
    def pass_name(cls) -> str:
        """The class's name in snake case: FuseQkv is fuse_qkv."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    @abstractmethod
    def run(self, program: Program, context: Context) -> None:
        """Edit `program` (a private copy) in place, each rewrite offered to the journal."""

    def options(self) -> dict[str, Any]:
        if not dataclasses.is_dataclass(self):
            return {}
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def with_options(self, changes: dict[str, Any]) -> Pass:
        """A copy with other options, text values parsed by the fields' types.

        Raises UnknownOption (with the nearest name) and WrongOption.
        """
        known = self.options()
        for name in changes:
            if name not in known:
                raise UnknownOption.named(name, known, where=f"pass {self.pass_name()}")
        parsed = {n: self._parse(n, value, known[n]) for n, value in changes.items()}
        return dataclasses.replace(self, **parsed) if parsed else self  # type: ignore[type-var]

    def _parse(self, name: str, value: Any, current: Any) -> Any:
        declared = str(next(f.type for f in dataclasses.fields(self) if f.name == name))  # type: ignore[arg-type]
        try:
            return parse_option(declared, value, current)
        except ValueError as error:
            raise WrongOption(
                f"option {self.pass_name()}.{name} cannot be {value!r}",
                expected=f"{declared} (default {current!r})",
                found=f"{value!r}",
                fix="see planish passes",
            ) from error

    def spelling(self) -> str:
        """smooth{alpha=0.7}: the name and the options that differ from the defaults."""
        if not dataclasses.is_dataclass(self):
            return self.pass_name()
        changed = [
            f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default and f.default is not dataclasses.MISSING
        ]
        return self.pass_name() + (f"{{{', '.join(changed)}}}" if changed else "")


class RulePass(Pass):
    """A pass that is a list of rules."""

    rules: ClassVar[Sequence[Rule]] = ()

    def run(self, program: Program, context: Context) -> None:
        apply_rules(program, self.rules, context.journal)


_WORDS: dict[str, Any] = {"none": None, "true": True, "false": False}


def parse_option(declared: str, value: Any, current: Any) -> Any:
    """A value, or its text, as the declared type ("int", "float | None"); ValueError if not."""
    kinds = {part.strip() for part in declared.split("|")}
    if isinstance(value, str) and value.lower() in _WORDS and "str" not in kinds:
        value = _WORDS[value.lower()]
    if value is None or isinstance(value, bool):
        if ("None" in kinds) if value is None else ("bool" in kinds):
            return value
        raise ValueError(value)
    if "int" in kinds and not isinstance(value, float):
        try:
            return int(value)
        except ValueError:
            if "float" not in kinds and "str" not in kinds:
                raise
    if "float" in kinds:
        return float(value)
    if "str" in kinds and isinstance(value, str):
        return value
    if isinstance(value, type(current)) and current is not None:
        return value
    raise ValueError(value)
