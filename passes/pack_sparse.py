"""Store 2:4 weights in half: their values and two bits each of places, instead of the zeros.

Before: `%w` is f32[out, in], with two zeros in every four values along the axis that its matmuls
sum over. After: `%w` is stored in the format 2:4 (or 4:8); the graph stays, and every reader sees
the same values, so this is exact. A GPU's kernel reads the half; elsewhere it is spread out again.
Codes of int3 to int8 likewise become int4-g64-sym+2:4 and so on, half of them and the places.
Source: the compressed format of Mishra et al. 2021, sec. 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.encoded import Encoded
from ..ir.format_affine import AffineInt
from ..ir.format_two_four import Compressed
from ..ir.format_two_four_codes import CompressedCodes
from ..ir.program import Program
from ..ir.sparsity_patterns import Sparsity
from ..ir.weight_roles import Role, weight_roles
from .contract import Context, Pass, contract

_FORMATS = (Compressed(2, 4), Compressed(4, 8))
_ANY = "two in every four along its summed axis"


@dataclass(frozen=True)
class PackSparse(Pass):
    """Store the weights that are 2:4 or 4:8 compressed; run it after all that changes weights."""

    contract = contract("exact", requires=["functional"], breaks=["dense_weights"])

    def run(self, program: Program, context: Context) -> None:
        roles = [role for role in weight_roles(program) if role.matmuls]
        for done, role in enumerate(roles):
            context.progress(done, len(roles), role.name)
            found = _format(program, role)
            if isinstance(found, str):
                context.journal.declined(self.pass_name(), role.name, found)
            elif context.journal.offers():
                entry = _packed(program, role, found)
                program.weights[role.name] = entry
                said = f"{found.name}: {entry.bits_per_weight():.3g} bits a weight"
                context.journal.changed_weight(self.pass_name(), role.name, said)


def _packed(program: Program, role: Role, fmt: Compressed | CompressedCodes) -> Encoded:
    if isinstance(fmt, CompressedCodes):
        entry = program.weights.entry(role.name)
        assert isinstance(entry, Encoded)
        return fmt.compressed(entry)
    assert role.axis is not None
    return fmt.encode(program.weights[role.name], role.axis, where=role.name)


def _format(program: Program, role: Role) -> Compressed | CompressedCodes | str:
    """The format that keeps a weight exactly, or why there is none."""
    entry = program.weights.entry(role.name)
    if isinstance(entry, Encoded):
        return _coded_format(entry)
    if role.axis is None:
        return "its readers sum over different axes"
    weight = program.weights[role.name]
    rows = weight.movedim(role.axis, -1)
    rows = rows.reshape(-1, rows.shape[-1])
    if not bool(rows.isfinite().all()):
        return "it holds infinities or NaNs"
    if _negative_zeros(rows):
        return "it holds negative zeros, which would become positive"
    for fmt in _FORMATS:
        if Sparsity(0.5, fmt.keep, fmt.of).holds(rows):
            return fmt
    return f"{_zeros(rows):.1%} zeros, but not {_ANY}"


def _coded_format(entry: Encoded) -> CompressedCodes | str:
    """The same for codes, whose groups lie along the axis that is summed."""
    if not isinstance(entry.format, AffineInt):
        return f"it is stored as {entry.format.name} already"
    if entry.format.bits < 3:
        return f"its codes of {entry.format.bits} bits are no smaller beside their places"
    for fmt in (CompressedCodes(entry.format, f.keep, f.of) for f in _FORMATS):
        if fmt.holds(entry):
            return fmt
    return f"the zeros among its codes of {entry.format.name} are not {_ANY}"


def _zeros(rows: Tensor) -> float:
    return float((rows == 0).float().mean())


def _negative_zeros(rows: Tensor) -> bool:
    return bool(((rows == 0) & torch.signbit(rows)).any())
