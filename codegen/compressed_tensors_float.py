"""Float8 layers of compressed-tensors checkpoints: float-quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..ir.encoded import Encoded
from ..ir.format_fp8 import Float8
from ..ir.weights import Entry
from ..ir.write_safetensors import Planned
from .checkpoint_export import CheckpointFormat, Layers
from .checkpoint_folder import made_later
from .compressed_tensors_config import per_token, quantization_config


@dataclass(frozen=True)
class FloatLayer:
    """A weight [out, in] of float8 e4m3 with one scale an output, or one for all."""

    name: str
    entry: Encoded
    whole: bool

    @property
    def path(self) -> str:
        return self.name.rpartition(".")[0]


def float8_format(activations: str) -> CheckpointFormat[FloatLayer]:
    """activations: none, or fp8 for products of float8 by float8."""
    return CheckpointFormat(
        "compressed-tensors",
        _layer,
        "fp8-e4m3-channel or fp8-e4m3-tensor in all quantized layers",
        "quantize with the format fp8-e4m3-channel, or leave the layer dense (option skip)",
        partial(_settings, activations=activations),
        _tensors,
    )


def _layer(name: str, entry: Entry) -> FloatLayer | None:
    if not isinstance(entry, Encoded) or not isinstance(entry.format, Float8):
        return None
    fits = entry.format.kind == "e4m3" and len(entry.shape) == 2 and entry.axis == -1
    if not fits or entry.format.size not in ("channel", "tensor"):
        return None
    return FloatLayer(name, entry, entry.format.size == "tensor")


def _tensors(
    layer: FloatLayer, settings: Mapping[str, Any], dtype: torch.dtype | None
) -> dict[str, Planned]:
    kept_scale = layer.entry.parts["scale"]
    scale = kept_scale[:1, 0] if layer.whole else kept_scale
    kept = dtype or scale.dtype
    codes = layer.entry.parts["codes"]
    float8 = torch.float8_e4m3fn
    return {
        f"{layer.path}.weight": made_later(layer.entry.shape, float8, lambda: codes.view(float8)),
        f"{layer.path}.weight_scale": made_later(tuple(scale.shape), kept, lambda: scale.to(kept)),
    }


def _settings(layers: Layers[FloatLayer], activations: str) -> dict[str, Any]:
    kinds: dict[bool, list[str]] = {}
    for layer in layers.quantized.values():
        kinds.setdefault(layer.whole, []).append(layer.path)
    groups = [(_weights(whole), paths) for whole, paths in kinds.items()]
    rounded = None if activations == "none" else per_token("float")
    return quantization_config("float-quantized", groups, rounded, layers.dense)


def _weights(whole: bool) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor" if whole else "channel",
        "group_size": None,
        "dynamic": False,
    }
