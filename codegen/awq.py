"""Target awq: a folder that AutoAWQ, transformers and vLLM load (version gemm), codes bit for bit.

A layer is qweight, qzeros and scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..ir.errors import UnsupportedByTarget
from ..ir.layout_awq import AwqLayout
from ..ir.program import Program
from ..ir.weights import Entry
from ..ir.write_safetensors import Planned
from .checkpoint_export import OPEN_OPTIONS, OPTIONS, CheckpointFormat, Layers
from .checkpoint_folder import made_later
from .checkpoint_layers import Layer, affine_layer
from .target import Target


def export(
    program: Program, folder: Path, profile: str, metadata: Mapping[str, Any], **options: Any
) -> dict[str, Any]:
    """Write the folder. Raises UnsupportedByTarget."""
    return _FORMAT.write(program, folder, options)


def _layer(name: str, entry: Entry) -> Layer | None:
    layer = affine_layer(name, entry)
    fits = (
        layer is not None
        and layer.bits == 4
        and not layer.ordered
        and layer.shape[0] % 8 == 0
        and layer.shape[1] % (layer.group_size or 1) == 0
    )
    return layer if fits else None


def _settings(layers: Layers[Layer]) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": _group_size(layers.quantized),
        "zero_point": True,
        "modules_to_not_convert": layers.dense or None,
    }


def _group_size(layers: Mapping[str, Layer]) -> int:
    """The one group size of all layers, -1 for one scale an output."""
    sizes = {layer.group_size or -1: name for name, layer in layers.items()}
    if len(sizes) > 1:
        raise UnsupportedByTarget(
            "target awq has one group size for all layers",
            where=", ".join(sizes.values()),
            expected="one group size",
            found=", ".join(map(str, sizes)),
            fix="quantize all layers alike, or use the target compressed-tensors",
        )
    return next(iter(sizes))


def _tensors(
    layer: Layer, settings: Mapping[str, Any], dtype: torch.dtype | None
) -> dict[str, Planned]:
    layout, (rows, length) = AwqLayout(), layer.shape
    kept = dtype or layer.scale_dtype
    words = torch.int32
    made = {
        "qweight": made_later((length, rows // 8), words, lambda: layout.pack(layer.codes())),
        "qzeros": made_later(
            (layer.groups, rows // 8), words, lambda: layout.pack(layer.zero_point())
        ),
        "scales": made_later((layer.groups, rows), kept, lambda: layer.scale().t().to(kept)),
    }
    return {f"{layer.path}.{ending}": tensor for ending, tensor in made.items()}


_FORMAT = CheckpointFormat(
    "awq",
    _layer,
    "integers of 4 bits, outputs a multiple of 8, groups that divide the inputs",
    "quantize with bits=4 and such a group_size, or use the target gptq or compressed-tensors",
    _settings,
    _tensors,
)

TARGET = Target(
    "awq",
    export,
    profiles=("gemm",),
    doc="an AWQ checkpoint for vLLM, AutoAWQ and transformers",
    options=OPTIONS,
    open_options=OPEN_OPTIONS,
)
