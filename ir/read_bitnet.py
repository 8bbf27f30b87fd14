"""BitNet b1.58 checkpoints: ternary weights as they are stored, four codes a byte.

The weights only: such a model also rounds its activations to 8 bits a token (W1.58A8), which the
captured program does not. Source: transformers' `bitnet` integration; Ma et al. 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .checkpoint_tensors import CheckpointTensors
from .encoded import Encoded
from .errors import UnsupportedCheckpoint
from .format_ternary import Signs
from .layout_bitnet import BitnetLayout
from .layouts import TritPacked


def read_bitnet(
    tensors: CheckpointTensors, config: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Encoded]:
    """Take the packed layers; returns their weights [out, in] by name.

    A linear_class autobitlinear multiplies its products by weight_scale, the older bitlinear
    divides them by it; the reciprocal is rounded once to float32. Raises UnsupportedCheckpoint,
    MissingTensor and TensorMismatch.
    """
    kind = str(config.get("linear_class", "bitlinear"))
    online = kind == "autobitlinear" and config.get("quantization_mode", "offline") == "online"
    if config.get("use_rms_norm") or online or kind not in ("bitlinear", "autobitlinear"):
        raise UnsupportedCheckpoint(
            "a BitNet checkpoint of a kind that planish does not read",
            where=tensors.where,
            expected="packed weights, and no norms inside the linear layers",
            found="use_rms_norm" if config.get("use_rms_norm") else "weights quantized online",
            fix="drop quantization_config to read its weights as floats, and quantize them with "
            "the format ternary-tensor",
        )
    return {
        f"{layer}.weight": _layer(tensors, layer, kind == "bitlinear", dtype)
        for layer in tensors.layers("weight_scale")
    }


def _layer(tensors: CheckpointTensors, layer: str, divided: bool, dtype: torch.dtype) -> Encoded:
    packed = tensors.take(layer, "weight", (torch.uint8,), 2)
    scale = tensors.take(layer, "weight_scale").float()
    if scale.numel() != 1:
        raise tensors.mismatch(f"{layer}.weight_scale", "one number", str(list(scale.shape)))
    codes = BitnetLayout().unpack(packed)
    if int(codes.max()) > 2:
        raise tensors.mismatch(f"{layer}.weight", "fields 0, 1 and 2", "a field of 3")
    factor = scale.reciprocal() if divided else scale
    rows = factor.reshape(1, 1).expand(codes.shape[0], 1).contiguous()
    parts = {"codes": TritPacked().pack(codes), "scale": rows}
    return Encoded(Signs("tensor"), tuple(codes.shape), dtype, -1, parts)
