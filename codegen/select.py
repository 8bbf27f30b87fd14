"""Choose a kernel for every matmul and look-up on an encoded weight, or say why it stays dense."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..ir.affine_form import affine_form, why_not_affine
from ..ir.encoded import Encoded, Format
from ..ir.format_affine import AffineInt
from ..ir.format_columns import WithColumns
from ..ir.format_offset import AffineOffset
from ..ir.format_sparse import WithOutliers
from ..ir.format_two_four_codes import CompressedCodes
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program
from ..ir.weight_roles import Role, weight_roles
from ..kernels.catalog import kernels

_ATEN = torch.ops.aten
_PRODUCTS = {
    _ATEN.linear.default,
    _ATEN.addmm.default,
    _ATEN.mm.default,
    _ATEN.matmul.default,
}


@dataclass(frozen=True)
class Choice:
    """What becomes of one encoded weight: its kernels' readers, or the reason for a dense one."""

    name: str
    entry: Encoded
    products: tuple[Node, ...] = ()
    tables: tuple[Node, ...] = ()
    declined: str = ""
    form: str = ""

    @property
    def sentence(self) -> str:
        what = f"%{self.name} ({self.entry.format.name})"
        if self.declined:
            return f"{what} stays dense because {self.declined}"
        used = ["linear_affine"] * bool(self.products) + ["rows_affine"] * bool(self.tables)
        return f"{what} runs packed{self.form}: {', '.join(used)}"


@dataclass
class Selection:
    """The choices for a program, in graph order."""

    choices: list[Choice] = field(default_factory=list[Choice])

    @property
    def sentences(self) -> list[str]:
        return [choice.sentence for choice in self.choices]


def select(program: Program) -> Selection:
    """Choose for every encoded weight of the program that something reads."""
    roles = {role.name: role for role in weight_roles(program)}
    selection = Selection()
    for node in program.weight_nodes():
        name = str(node.target)
        entry = program.weights.entry(name)
        if isinstance(entry, Encoded):
            selection.choices.append(_choose(name, entry, roles.get(name)))
    return selection


def _choose(name: str, entry: Encoded, role: Role | None) -> Choice:
    reason = "it is a vector" if role is None else _why_not(entry, role)
    if reason is not None or role is None:
        return Choice(name, entry, declined=reason or "")
    form = described(entry.format)
    return Choice(name, entry, tuple(role.matmuls), tuple(role.tables), form=form)


def described(fmt: Format) -> str:
    """What the packed kernel takes a format for, and what is added to its product."""
    match fmt:
        case AffineOffset():
            return " with its offsets as a product of group sums"
        case WithColumns():
            return f"{described(fmt.base)} with its columns beside it"
        case WithOutliers():
            return f"{described(fmt.base)} with its outliers beside it"
        case AffineInt():
            return ""
        case CompressedCodes():
            return " with the zeros put back"
        case _:
            return " as integers"


def _why_not(entry: Encoded, role: Role) -> str | None:
    if role.others:
        return f"%{role.others[0].name} reads it too, and is neither a matmul nor a look-up"
    if role.axis is None or role.axis != entry.axis:
        return "its groups do not lie along the axis that its readers sum over"
    form = affine_form(entry)
    if form is None:
        return why_not_affine(entry)
    if role.tables and (form.columns is not None or form.entries is not None):
        return "no kernel looks up rows with values beside the base"
    for product in role.matmuls:
        if product.target not in _PRODUCTS:
            return f"%{product.name} is {product.target}, a product of stacks"
        if reason := _odd_addmm(product):
            return reason
        dtype = product.meta["val"].dtype
        if reason := kernels()["linear_affine"].why_not(form.steps, dtype):
            return reason
    return kernels()["rows_affine"].why_not(form.steps, entry.dtype) if role.tables else None


def _odd_addmm(node: Node) -> str | None:
    if node.target is not _ATEN.addmm.default:
        return None
    given = bound_arguments(node)
    if given["beta"] != 1 or given["alpha"] != 1:
        return f"%{node.name} scales its product"
    bias = given["self"]
    if bias.meta["val"].dim() != 1 or bias.meta["val"].shape != node.meta["val"].shape[-1:]:
        return f"%{node.name} adds more than a bias"
    return None
