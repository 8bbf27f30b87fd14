"""Which weights get which number format: the options that all methods of quantization share."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

import torch

from ..ir.errors import UnsupportedGroupSize, WrongOption
from ..ir.formats import AffineInt, Format, parse_format
from ..ir.program import Program
from ..ir.rewrite import Journal
from ..ir.weight_roles import Role, weight_roles
from .contract import Pass, contract
from .layer_patterns import LayerPatterns

SCALES = {"weight": None, "float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class WeightQuantizer(Pass):
    """Base of the passes that put weights into number formats.

    bits: 2 to 8. group_size: values that share a scale along the summed axis; none: one scale a
    channel. symmetric: no zero points. scale_dtype: "float32", "float16", or "weight" for the
    weight's own dtype. remainder: "refuse" a width that group_size does not divide, or let the
    last group be "short". embeddings: format of looked-up tables and of heads tied to them
    ("none", or a name such as int8-g64-sym). skip: names to leave alone, comma-separated patterns.
    format: any format by name, in place of the four options above it. overrides: formats of single
    layers, "PATTERN=FORMAT; PATTERN=none", matched with the weight's name or its module's path; the
    last match counts.
    """

    contract = contract(
        "lossy", requires=["functional"], ensures=["quantized"], breaks=["dense_weights"]
    )
    bits: int = 8
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: str = "float32"
    remainder: str = "refuse"
    embeddings: str = "none"
    skip: str = ""
    format: str = ""
    overrides: str = ""

    def __post_init__(self) -> None:
        for option, value, known in (
            ("scale_dtype", self.scale_dtype, tuple(SCALES)),
            ("remainder", self.remainder, ("refuse", "short")),
        ):
            if value not in known:
                raise WrongOption(
                    f"option {self.pass_name()}.{option} cannot be {value!r}",
                    expected=" or ".join(known),
                    found=repr(value),
                    fix=f"choose one of {', '.join(known)}",
                )
        _ = self.linear_format, self.table_format, self.override_formats

    @property
    def linear_format(self) -> Format:
        if self.format:
            return parse_format(self.format)
        return AffineInt(self.bits, self.group_size, self.symmetric, SCALES[self.scale_dtype])

    @property
    def table_format(self) -> Format | None:
        return None if self.embeddings == "none" else parse_format(self.embeddings)

    @property
    def override_formats(self) -> LayerPatterns:
        """Raises WrongOption and UnknownFormat."""
        found = LayerPatterns.parse(self.overrides, f"{self.pass_name()}.overrides")
        for _, name in found.choices:
            _named(name)
        return found

    def planned(self, program: Program, journal: Journal) -> list[tuple[Role, Format]]:
        """The weights to encode and their formats, in graph order; the others are declined.

        Raises UnsupportedGroupSize, and UnknownOption for an override that names nothing.
        """
        roles = weight_roles(program)
        overrides = self.override_formats
        names = [name for role in roles for name in program.weights.names_of(role.name)]
        overrides.check(names, f"option {self.pass_name()}.overrides")
        offered = [(role, self._format_for(program, role, overrides, journal)) for role in roles]
        chosen = [(role, fmt) for role, fmt in offered if fmt is not None]
        for role, fmt in chosen:
            self._check_width(role, fmt)
        return chosen

    def expected_change(self, program: Program) -> int:
        """By how many bytes the weights will change, from their shapes alone."""
        change = 0
        for role, fmt in self.planned(program, Journal(program)):
            assert role.axis is not None
            shape = [int(size) for size in role.value.shape]
            bits = fmt.bits_per_weight(shape, role.axis, role.value.dtype)
            change += round(bits * role.value.numel() / 8) - role.value.nbytes
        return change

    def _format_for(
        self, program: Program, role: Role, overrides: LayerPatterns, journal: Journal
    ) -> Format | None:
        """The format of one weight, or None with the reason in the journal."""
        if not role.matmuls and not role.tables:
            return None
        fmt = self.table_format if role.tables else self.linear_format
        reason = None if fmt is not None else "a looked-up table; the option embeddings is none"
        for name in program.weights.names_of(role.name):
            if (choice := overrides.of(name)) is not None:
                fmt, reason = _named(choice), "set to none by the option overrides"
        skipped = any(fnmatch.fnmatch(role.name, p.strip()) for p in self.skip.split(","))
        if skipped:
            reason = "named in the option skip"
        reason = _hindrance(role) if fmt is not None and not skipped else reason
        if reason:
            journal.declined(self.pass_name(), role.name, reason)
            return None
        return fmt

    def _check_width(self, role: Role, fmt: Format) -> None:
        size = getattr(fmt, "group_size", None)
        assert role.axis is not None
        width = int(role.value.shape[role.axis])
        if size is None or width % size == 0 or self.remainder == "short":
            return
        divisors = [g for g in (256, 128, 64, 32, 16) if width % g == 0]
        offers = [f"group_size={g}" for g in divisors[:2]]
        offers += ["group_size=none (per channel)", "remainder=short", f"skip={role.name}"]
        raise UnsupportedGroupSize(
            f"groups of {size} do not divide the {width} inputs of {role.name}",
            where=role.name,
            expected=f"a divisor of {width}",
            found=str(size),
            fix="use " + ", or ".join(offers),
        )


def _hindrance(role: Role) -> str | None:
    """Why a weight cannot be encoded at all."""
    if role.others:
        reader = role.others[0]
        return f"also read by %{reader.name}, which is neither a matmul nor a look-up"
    if role.axis is None or (role.tables and role.axis != -1):
        return "its readers sum over different axes"
    if role.value.dim() > 2 and role.tables:
        return "a table of more than two axes"
    return None


def _named(name: str) -> Format | None:
    return None if name == "none" else parse_format(name)
