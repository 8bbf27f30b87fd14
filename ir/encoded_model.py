"""A model whose weights come in number formats: a module to capture, and its encoded weights.

The module is made by the library that knows the architecture. For every encoded weight it is
handed a stand-in that takes no memory and holds one number all over, which says whose stand-in it
is; so the loader may rename weights and stack them (experts), and where each one went is read
from the module afterwards. No table of names is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .encoded import Encoded
from .errors import UnsupportedCheckpoint
from .program import Program
from .stack_encoded import stack_rows, why_not_row_stacked

_MOST = 31_000  # positive bit patterns that are numbers in float16, bfloat16 and wider


@dataclass(frozen=True)
class EncodedModel:
    """module: its encoded parameters hold no values; entries: those, by parameter name."""

    module: nn.Module
    entries: Mapping[str, Encoded]
    notes: list[str] = field(default_factory=list[str])

    def attach(self, program: Program) -> Program:
        """Give the captured program of `module` its encoded weights."""
        for name, entry in self.entries.items():
            if name in program.weights:
                program.weights[name] = entry
        program.facts = (program.facts - {"dense_weights"}) | {"quantized"}
        program.metadata["notes"] = [*program.metadata.get("notes", []), *self.notes]
        return program


def stand_ins(entries: Mapping[str, Encoded], dtype: torch.dtype, where: str) -> dict[str, Tensor]:
    """For each weight a tensor of its shape that holds its number (from 1 on) everywhere."""
    if len(entries) > _MOST:
        raise UnsupportedCheckpoint(
            "the checkpoint has more encoded weights than planish can tell apart",
            where=where,
            expected=f"at most {_MOST}",
            found=str(len(entries)),
        )
    values = _numbers(len(entries), dtype)
    return {
        name: value.expand(entry.shape)
        for value, (name, entry) in zip(values, entries.items(), strict=True)
    }


def placed(
    module: nn.Module, entries: Mapping[str, Encoded], dtype: torch.dtype, where: str
) -> dict[str, Encoded]:
    """The encoded weights by parameter name; their parameters get memory without values.

    Raises UnsupportedCheckpoint where the loader put weights together that cannot be.
    """
    listed = list(entries.values())
    found: dict[str, Encoded] = {}
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2 or parameter.device.type == "meta":
            continue
        numbers = _origins(parameter.detach(), dtype, len(listed))
        if numbers is None:
            continue
        parts = [listed[number - 1] for number in numbers]
        found[name] = parts[0] if len(parts) == 1 else _joined(name, parts, parameter.shape, where)
        # Not touched, hence not there: the system hands out pages when they are written to.
        parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype)
    return found


def _numbers(count: int, dtype: torch.dtype) -> list[Tensor]:
    """Scalars of `dtype` with the bit patterns 1 to count."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return list(torch.arange(1, count + 1, dtype=whole).view(dtype))


def _origins(value: Tensor, dtype: torch.dtype, count: int) -> list[int] | None:
    """The numbers of the stand-ins that lie in `value` one after the other, if it is of those."""
    first, last = value[..., 0].flatten(), value[..., -1].flatten()
    if all(step == 0 for step in value.stride()):
        first, last = first[:1], last[:1]
    if not torch.equal(first, last):
        return None
    codes = {float(number): place for place, number in enumerate(_numbers(count, dtype), 1)}
    runs = torch.unique_consecutive(first)
    numbers = [codes.get(run) for run in runs.tolist()]
    known = [number for number in numbers if number is not None]
    return known if len(known) == len(numbers) else None


def _joined(name: str, parts: list[Encoded], shape: torch.Size, where: str) -> Encoded:
    """Encoded matrices stacked by rows, as a weight of `shape` [..., rows, in]."""
    reason = why_not_row_stacked(parts)
    if reason is None and sum(part.shape[0] for part in parts) != shape[:-1].numel():
        reason = "their rows do not fill the weight"
    if reason is not None:
        raise UnsupportedCheckpoint(
            f"the weight {name} is put together from encoded ones that do not fit",
            where=where,
            expected="weights of one number format, stacked by rows",
            found=reason,
            fix="offer the original checkpoint; planish quantizes it itself",
        )
    flat = stack_rows(parts)
    stored: dict[str, Any] = {
        key: part.reshape(*shape[:-1], part.shape[-1]) for key, part in flat.parts.items()
    }
    return Encoded(flat.format, tuple(shape), flat.dtype, -1, stored)
