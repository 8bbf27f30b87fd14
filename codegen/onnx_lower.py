"""Lowering for ONNX: a copy of the program in the operations of which onnxruntime makes one node.

Profile standard needs none of it; there every operation is written as ONNX itself knows it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.edit import Editor
from ..ir.program import Program
from .onnx_builder import Options
from .onnx_decoder import Decoder, find_decoder, share_buffers
from .onnx_skip_norm import fuse_skip_norms


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
    if options.contrib:
        if decoder is not None:
            decoder = share_buffers(program, decoder, notes)
        fuse_skip_norms(program, editor)
    editor.sweep()
    return Lowered(program, decoder, notes)
