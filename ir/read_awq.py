"""AWQ checkpoints (AutoAWQ, llm-awq; version gemm): their codes as they are, in our formats.

A layer is qweight, qzeros and scales. Source: the files that AutoAWQ writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .checkpoint_tensors import CheckpointTensors
from .encoded import Encoded
from .errors import UnsupportedCheckpoint
from .layout_awq import AwqLayout
from .read_gptq import affine_entry


def read_awq(
    tensors: CheckpointTensors, config: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Encoded]:
    """Take the quantized layers; returns their weights [out, in] by name.

    Raises UnsupportedCheckpoint, MissingTensor and TensorMismatch.
    """
    _check(tensors, config)
    return {f"{layer}.weight": _layer(tensors, layer, dtype) for layer in tensors.layers("qweight")}


def _check(tensors: CheckpointTensors, config: Mapping[str, Any]) -> None:
    bits = int(config.get("bits", config.get("w_bit", 4)))
    version = str(config.get("version", config.get("format", "gemm"))).lower()
    scaled = [name for name in tensors.left if name.endswith(".act.scales")]
    if bits == 4 and version == "gemm" and not scaled:
        return
    raise UnsupportedCheckpoint(
        "an AWQ checkpoint of a kind that planish does not read",
        where=tensors.where,
        expected="4 bits, version gemm, all scales folded into weights",
        found=scaled[0] if scaled else f"{bits} bits, version {version}",
        fix="offer the original checkpoint; planish quantizes it itself",
    )


def _layer(tensors: CheckpointTensors, layer: str, dtype: torch.dtype) -> Encoded:
    qweight = tensors.take(layer, "qweight", (torch.int32,), 2)
    scales = tensors.take(layer, "scales", (torch.float16, torch.bfloat16, torch.float32), 2)
    qzeros = tensors.take(layer, "qzeros", (torch.int32,), 2)
    length, words = qweight.shape
    groups = scales.shape[0]
    tensors.check_shape(layer, "scales", scales, (groups, 8 * words))
    tensors.check_shape(layer, "qzeros", qzeros, (groups, words))
    if groups == 0 or length % groups:
        raise tensors.mismatch(f"{layer}.scales", f"a divisor of {length} groups", f"{groups}")
    layout = AwqLayout()
    size = None if groups == 1 else length // groups
    codes, zeros = layout.unpack(qweight), layout.unpack(qzeros)
    return affine_entry(4, size, codes, scales.t().contiguous(), zeros, dtype)
