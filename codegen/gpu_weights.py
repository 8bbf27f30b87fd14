"""Encoded weights as the arguments of the kernel that reads them packed."""

from __future__ import annotations

from typing import Any

from ..ir.edit import Editor
from ..ir.encoded import Encoded
from ..ir.program import Node
from ..kernels.triton_spec import TritonSpec


def packed_arguments(
    editor: Editor, weight: Node, entry: Encoded, turned: bool
) -> tuple[TritonSpec, dict[str, Any]] | str:
    """The kernel and its arguments for an encoded weight, or why there is none."""
    return f"its weight is {entry.format.name}"
