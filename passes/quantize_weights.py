"""Quantize weights: round to nearest on an affine integer grid.

Before: `%w` is f32[out, in]. After: `%w` is stored as integer codes with a scale (and zero point)
for each channel or group; the graph does not change, and every reader sees the rounded values.
Lossy within half a step of each weight (with `search`, within a step or more for the largest, and
less on the whole). Axis of the groups: the one that the reading matmul sums
over, found in the graph (last for `linear`, first for `addmm`).
Source: uniform affine quantization, Jacob et al. 2018, sec. 2.1; groups as in Dettmers et al. 2022.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from functools import partial

import torch

from ..ir.errors import UnsupportedGroupSize, WrongOption
from ..ir.formats import AffineInt, Format, parse_format
from ..ir.least_squares_grid import encode_least_squares
from ..ir.program import Program
from ..ir.rewrite import Journal
from ..ir.weight_roles import Role, weight_roles
from .contract import Context, Pass, contract

_SCALES = {"weight": None, "float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Round weights to nearest, in integers of `bits` bits.

    bits: 2 to 8. group_size: values that share a scale along the summed axis; none: one scale a
    channel. symmetric: no zero points. scale_dtype: "float32", "float16", or "weight" for the
    weight's own dtype. remainder: "refuse" a width that group_size does not divide, or let the
    last group be "short". embeddings: format of looked-up tables and of heads tied to them
    ("none", or a name such as int8-g64-sym). skip: names to leave alone, comma-separated patterns.
    search: try grids beside the one of each group's range, and keep the one of least squared error.
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
    search: bool = False

    def __post_init__(self) -> None:
        for option, value, known in (
            ("scale_dtype", self.scale_dtype, tuple(_SCALES)),
            ("remainder", self.remainder, ("refuse", "short")),
        ):
            if value not in known:
                raise WrongOption(
                    f"option quantize_weights.{option} cannot be {value!r}",
                    expected=" or ".join(known),
                    found=repr(value),
                    fix=f"choose one of {', '.join(known)}",
                )
        _ = self.linear_format, self.table_format

    @property
    def linear_format(self) -> AffineInt:
        scale = _SCALES[self.scale_dtype]
        return AffineInt(self.bits, self.group_size, self.symmetric, scale)

    @property
    def table_format(self) -> Format | None:
        return None if self.embeddings == "none" else parse_format(self.embeddings)

    def planned(self, program: Program, journal: Journal) -> list[tuple[Role, Format]]:
        """The weights to encode and their formats; raises UnsupportedGroupSize."""
        offered = [(role, self._format_for(role, journal)) for role in weight_roles(program)]
        chosen = [(role, fmt) for role, fmt in offered if fmt is not None]
        for role, fmt in chosen:
            self._check_width(role, fmt)
        return chosen

    def expected_change(self, program: Program) -> int:
        """By how many bytes the weights will change, from their shapes alone."""
        change = 0
        for role, fmt in self.planned(program, Journal(program)):
            assert role.axis is not None
            width = int(role.value.shape[role.axis])
            row = fmt.encode(torch.ones(1, width, dtype=role.value.dtype))
            change += row.nbytes() * (role.value.numel() // width) - role.value.nbytes
        return change

    def run(self, program: Program, context: Context) -> None:
        chosen = self.planned(program, context.journal)
        for done, (role, fmt) in enumerate(chosen):
            context.progress(done, len(chosen), role.name)
            if context.journal.offers():
                assert role.axis is not None
                weight = program.weights[role.name]
                searched = self.search and fmt == self.linear_format
                encode = (
                    partial(encode_least_squares, self.linear_format) if searched else fmt.encode
                )
                program.weights[role.name] = encode(weight, role.axis, where=role.name)
                context.journal.changed_weight(self.pass_name(), role.name, fmt.name)

    def _format_for(self, role: Role, journal: Journal) -> Format | None:
        """The format of one weight, or None with the reason in the journal."""
        fmt = self.table_format if role.tables else self.linear_format
        reason = None
        if any(fnmatch.fnmatch(role.name, p.strip()) for p in self.skip.split(",")):
            reason = "named in the option skip"
        elif not role.matmuls and not role.tables:
            return None
        elif fmt is None:
            reason = "a looked-up table; the option embeddings is none"
        elif role.others:
            reader = role.others[0]
            reason = f"also read by %{reader.name}, which is neither a matmul nor a look-up"
        elif role.axis is None or (role.tables and role.axis != -1):
            reason = "its readers sum over different axes"
        elif role.value.dim() > 2 and role.tables:
            reason = "a table of more than two axes"
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
