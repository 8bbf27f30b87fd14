"""Weights of float8 with scales, as compressed-tensors and fine-grained fp8 checkpoints have them.

The bytes are carried over as they are. Source: the files that the package compressed-tensors
writes (float-quantized), and those of DeepSeek-V3 (quant_method fp8, weight_scale_inv).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .checkpoint_tensors import CheckpointTensors
from .encoded import Encoded
from .format_fp8 import DTYPES, Float8, Kind
from .scaled_table import Size

FLOAT8 = tuple(DTYPES.values())
_SCALES = (torch.float16, torch.bfloat16, torch.float32)


def float8_entry(weight: Tensor, scale: Tensor, size: Size, dtype: torch.dtype) -> Encoded:
    """weight float8 [out, in], scale [out, groups] as an encoded weight."""
    kind: Kind = "e4m3" if weight.dtype == torch.float8_e4m3fn else "e5m2"
    parts = {"codes": weight.contiguous().view(torch.uint8), "scale": scale.contiguous()}
    return Encoded(Float8(size, scale.dtype, kind), tuple(weight.shape), dtype, -1, parts)


def read_float8(
    tensors: CheckpointTensors, config: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Encoded]:
    """Take the layers of a fine-grained fp8 checkpoint; raises MissingTensor, TensorMismatch."""
    block = [int(side) for side in config.get("weight_block_size") or (128, 128)]
    return {
        f"{layer}.weight": _layer(tensors, layer, block, dtype)
        for layer in tensors.layers("weight_scale_inv")
    }


def _layer(tensors: CheckpointTensors, layer: str, block: list[int], dtype: torch.dtype) -> Encoded:
    weight = tensors.take(layer, "weight", FLOAT8, 2)
    scale = tensors.take(layer, "weight_scale_inv", _SCALES, 2)
    tensors.left.pop(f"{layer}.activation_scale", None)
    rows = spread_rows(tensors, f"{layer}.weight_scale_inv", scale, block, weight.shape)
    return float8_entry(weight, rows, block[1], dtype)


def spread_rows(
    tensors: CheckpointTensors, name: str, scale: Tensor, block: list[int], shape: torch.Size
) -> Tensor:
    """Scales of blocks [tall, wide] as scales [out, groups of `wide`]; raises TensorMismatch."""
    tall, wide = block
    expected = [-(-shape[0] // tall), -(-shape[1] // wide)]
    if list(scale.shape) != expected:
        raise tensors.mismatch(name, str(expected), str(list(scale.shape)))
    return scale.repeat_interleave(tall, 0)[: shape[0]]
