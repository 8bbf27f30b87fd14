"""Lower products on quantized activations for the CPU: codes in, integer sums, scaled once."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from ..ir.affine_form import AffineForm, affine_form
from ..ir.edit import Editor, value_of
from ..ir.pattern import bound_arguments
from ..ir.program import Node
from ..ir.text import value_names
from ..kernels.catalog import kernels
from ..kernels.linear_affine import pack
from ..kernels.linear_w8a8_cpu import code_sums
from .int8_codes import regular_codes, viewed
from .lower_affine import beside_parts, cast, entry_terms, shared_part, with_additions
from .select_int8 import RoundedProduct, rounded_products, sentence

_ATEN = torch.ops.aten
_OPS = torch.ops.planish


def lower_int8(editor: Editor) -> list[str]:
    """The integer kernel for every product that can; a sentence for each on rounded activations."""
    names = value_names(editor.graph)
    lowering = _Lowering(editor)
    sentences: list[str] = []
    for product in rounded_products(editor.program):
        sentences.append(sentence(product, names))
        if not product.declined:
            lowering.replace(product)
    editor.sweep()
    return sentences


class _Lowering:
    """Codes are made once for each value, packed parts once for each weight."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self.codes: dict[Node, tuple[Node, Node, Node | None]] = {}
        self.outliers: dict[Node, Node] = {}
        self.beside: dict[str, dict[str, Node]] = {}

    def replace(self, product: RoundedProduct) -> None:
        editor, node = self.editor, product.node
        form = affine_form(product.kept)
        assert form is not None
        codes, scale, zero = self._codes(product.rounded)
        packed = pack(form.steps)
        sums = None if zero is None else code_sums(form.steps)
        parts = {"codes": packed.codes, "scale": packed.scale, "zero": packed.zero, "sums": sums}
        weight = [self._part(product, kind, part) for kind, part in parts.items()]
        beside = self._beside(product, form)
        with editor.at(node):
            given = [viewed(editor, codes, product), scale, zero, *weight, product.bias]
            target: Any = _OPS.linear_w8a8_cpu.default
            if product.keeps_outliers:
                target = _OPS.linear_llm_int8_cpu.default
                x = bound_arguments(product.rounded)["x"]
                given += [viewed(editor, x, product), self.outliers[product.rounded]]
            new = editor.emit(target, *given, *packed.sizes)
            if not form.plain:
                new = self._with_additions(product, form, beside, new)
            new = cast(editor, new, value_of(node).dtype)
        editor.replace(node, new)

    def _beside(self, product: RoundedProduct, form: AffineForm) -> dict[str, Node]:
        """What the weight adds to its steps, stored once for all readers."""
        name = str(product.weight.target)
        if name not in self.beside:
            self.beside[name] = beside_parts(self.editor, name, form)
        return self.beside[name]

    def _with_additions(
        self, product: RoundedProduct, form: AffineForm, beside: dict[str, Node], result: Node
    ) -> Node:
        """Products of the rounded values with what lies beside the weight's steps."""
        editor = self.editor
        x = cast(editor, viewed(editor, product.rounded, product), torch.float32)
        result = with_additions(editor, form, beside, x, result)
        if "entry_rows" in beside:
            terms = entry_terms(editor, beside, x)
            result = editor.emit(_ATEN.index_add.default, result, -1, beside["entry_rows"], terms)
        return result

    def _codes(self, rounded: Node) -> tuple[Node, Node, Node | None]:
        """Codes, scale and zero point of a rounded value."""
        if rounded not in self.codes:
            given = bound_arguments(rounded)
            if rounded.target is _OPS.round_regular.default:
                self.codes[rounded] = self._regular_codes(rounded)
            else:
                quantize: Node = given["codes"]
                scale: Node = given["scale"]
                fast = self._fast_codes(quantize, scale)
                self.codes[rounded] = fast or (quantize, scale, given["zero"])
        return self.codes[rounded]

    def _regular_codes(self, rounded: Node) -> tuple[Node, Node, Node | None]:
        """Codes of all but the outlier columns, which are zeros here."""
        columns, codes, scale = regular_codes(self.editor, rounded)
        self.outliers[rounded] = columns
        return self._fast_codes(codes, scale) or (codes, scale, None)

    def _fast_codes(self, quantize: Node, scale: Node) -> tuple[Node, Node, None] | None:
        """Codes by token from one kernel, where what is rounded is float32."""
        if quantize.target is not _OPS.quantize.default:
            return None
        if scale.target is not _OPS.activation_scale.default:
            return None
        read, found = bound_arguments(quantize), bound_arguments(scale)
        if found["per"] != "token" or not found["symmetric"] or found["x"] is not read["x"]:
            return None
        if kernels()["quantize_rows_cpu"].why_not(value_of(read["x"]).dtype):
            return None
        with self.editor.at(quantize):
            both = self.editor.emit(_OPS.quantize_rows_cpu.default, read["x"])
            codes, steps = (self.editor.emit(operator.getitem, both, place) for place in (0, 1))
        return codes, steps, None

    def _part(self, product: RoundedProduct, kind: str, part: Tensor | None) -> Node | None:
        name = f"{product.weight.target}.packed_{kind}"
        return None if part is None else shared_part(self.editor, name, part)
