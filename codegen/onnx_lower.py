"""Lowering for ONNX: a copy of the program in the operations of which onnxruntime makes one node.

Profile standard is lowered to ONNX's own operators only, profile ort to onnxruntime's as well.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.edit import Editor
from ..ir.program import Program
from .onnx_builder import Options
from .onnx_decoder import Decoder, find_decoder, plain_caches, share_buffers
from .onnx_flat_attention import lower_flat_attention
from .onnx_lower_affine import lower_affine_forms
from .onnx_lower_int8 import lower_int8_products
from .onnx_skip_norm import fuse_skip_norms
from .onnx_splits import join_slices


@dataclass(frozen=True)
class Lowered:
    """A program to be written operation by operation, its cache if it has one, and remarks."""

    program: Program
    decoder: Decoder | None
    notes: list[str]


def lower(program: Program, options: Options) -> Lowered:
    """The program as it is written; the given one stays as it is."""
    program = program.copy()
    notes: list[str] = []
    decoder = find_decoder(program)
    editor = Editor(program)
    if options.contrib and decoder is not None:
        decoder = share_buffers(program, decoder, notes)
    lower_int8_products(program, editor, notes)
    lower_affine_forms(program, editor, notes)
    cached = [] if decoder is None or decoder.shared else plain_caches(program, decoder)
    lower_flat_attention(program, editor, cached, softcap=options.contrib)
    if options.contrib:
        fuse_skip_norms(program, editor)
    editor.sweep()
    join_slices(program, editor)
    editor.sweep()
    return Lowered(program, decoder, notes)
