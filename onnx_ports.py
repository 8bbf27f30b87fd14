"""The inputs and outputs of a decoder folder's session, told apart by their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .decoder_folder import MODEL, DecoderFolder, NotADecoderFolder
from .onnx_cache import CachePorts
from .passes.add_tree_mask import TREE_MASK, TREE_POSITIONS

MASK = "attention_mask"
"""Ones over past and new tokens: of a shared cache, or of a model captured with a padding mask."""

DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True)
class Ports:
    """Inputs and outputs as onnxruntime has them (name, type, shape).

    mask: of ones, if there is one. tree: the mask of a tree of tokens and their depths, if the
    model can look at one. extra: outputs between the logits and the cache.
    """

    ids: Any
    mask: Any | None
    tree: tuple[Any, Any] | None
    logits: Any
    extra: tuple[Any, ...]
    cache: CachePorts


def read_ports(session: Any, told: DecoderFolder) -> Ports:
    """The ports of a session, checked against the manifest; raises NotADecoderFolder."""
    inputs = {port.name: port for port in session.get_inputs()}
    outputs = list(session.get_outputs())
    mask = inputs.pop(told.mask or MASK, None)
    tree = [inputs.pop(name) for name in (TREE_MASK, TREE_POSITIONS) if name in inputs]
    count = 2 * len(told.shapes)
    known = all(port.type in DTYPES for port in [*inputs.values(), *outputs])
    fits = len(inputs) == 1 + count and len(outputs) >= 1 + count and known
    if not fits or len(tree) == 1 or (told.mask and mask is None):
        raise NotADecoderFolder(
            "the model does not have the inputs and outputs that the manifest describes",
            where=str(told.path / MODEL),
            expected=f"token ids, {count} of the cache, mask {told.mask}; logits, {count} again",
            found=f"inputs {', '.join(inputs)}; {len(outputs)} outputs",
            fix="export the model again",
        )
    ids, *past = inputs.values()
    present = outputs[len(outputs) - count :]
    cache = CachePorts(
        [port.name for port in past],
        [port.name for port in present],
        [(heads, width) for heads, *widths in told.shapes for width in widths],
        DTYPES[past[0].type] if past else np.float32,
    )
    extra = tuple(outputs[1 : len(outputs) - count])
    return Ports(ids, mask, (tree[0], tree[1]) if tree else None, outputs[0], extra, cache)
