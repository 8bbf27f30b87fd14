"""Target gptq: a folder that GPTQModel, transformers and vLLM load, codes bit for bit.

A layer is qweight, qzeros, scales and g_idx. checkpoint_format gptq stores zero points less one,
which cannot say zero, and GPTQModel refuses it for asymmetric layers unless it wrote them; gptq_v2
stores them as they are, and older releases of vLLM take it for gptq. auto: gptq where all layers
are symmetric, else gptq_v2.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..ir.errors import UnsupportedByTarget
from ..ir.layout_gptq import GptqLayout
from ..ir.program import Program
from ..ir.weights import Entry
from ..ir.write_safetensors import Planned
from .bundle import planish_version
from .checkpoint_export import OPEN_OPTIONS, OPTIONS, CheckpointFormat, Layers
from .checkpoint_folder import made_later
from .checkpoint_layers import Layer, affine_layer
from .target import Target


def export(
    program: Program, folder: Path, profile: str, metadata: Mapping[str, Any], **options: Any
) -> dict[str, Any]:
    """Write the folder. Raises UnsupportedByTarget."""
    settings = partial(_settings, form=options["checkpoint_format"])
    return replace(_FORMAT, settings=settings).write(program, folder, options)


def _layer(name: str, entry: Entry) -> Layer | None:
    layer = affine_layer(name, entry)
    if layer is None or layer.bits not in (2, 3, 4, 8) or any(n % 32 for n in layer.shape):
        return None
    return layer


def _tensors(
    layer: Layer, settings: Mapping[str, Any], dtype: torch.dtype | None
) -> dict[str, Planned]:
    version = 2 if settings["checkpoint_format"] == "gptq_v2" else 1
    layout = GptqLayout(layer.bits, version)
    (rows, length), groups = layer.shape, layer.groups
    kept = dtype or layer.scale_dtype
    words = torch.int32
    made = {
        "qweight": made_later(
            (length * layer.bits // 32, rows), words, lambda: layout.pack(layer.codes())
        ),
        "qzeros": made_later(
            (groups, rows * layer.bits // 32),
            words,
            lambda: layout.pack_zero_points(layer.zero_point()),
        ),
        "scales": made_later((groups, rows), kept, lambda: layer.scale().t().to(kept)),
        "g_idx": made_later((length,), words, layer.group_of),
    }
    return {f"{layer.path}.{ending}": tensor for ending, tensor in made.items()}


def _settings(layers: Layers[Layer], form: str = "auto") -> dict[str, Any]:
    """quantization_config; what differs from the usual layer stands in `dynamic`."""
    found = layers.quantized.values()
    kinds = {layer.path: (layer.bits, layer.group_size or -1) for layer in found}
    (bits, size), _ = Counter(kinds.values()).most_common(1)[0]
    dynamic: dict[str, dict[str, Any]] = {
        f"+:^{re.escape(path)}$": {"bits": kind[0], "group_size": kind[1]}
        for path, kind in kinds.items()
        if kind != (bits, size)
    }
    dynamic |= {f"-:^{re.escape(path)}$": {} for path in layers.dense if path != "lm_head"}
    if form == "auto":
        form = "gptq" if all(layer.symmetric for layer in found) else "gptq_v2"
    if form == "gptq":
        _refuse_zero(layers)
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": size,
        "desc_act": any(layer.ordered for layer in found),
        "sym": all(layer.symmetric for layer in found),
        "lm_head": "lm_head" in kinds,
        "checkpoint_format": form,
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {"quantizer": [f"planish:{planish_version()}"]},
    }


def _refuse_zero(layers: Layers[Layer]) -> None:
    for name, layer in layers.quantized.items():
        if not layer.symmetric and bool((layer.zero_point() == 0).any()):
            raise UnsupportedByTarget(
                f"checkpoint_format gptq cannot hold the zero points of {name}",
                where=name,
                expected="zero points from 1 on, since they are stored less one",
                found="a zero point of 0",
                fix="use checkpoint_format=gptq_v2, or quantize symmetrically",
            )


_FORMAT = CheckpointFormat(
    "gptq",
    _layer,
    "integers of 2, 3, 4 or 8 bits, inputs and outputs multiples of 32",
    "quantize with bits=4 or 8, or use the target compressed-tensors",
    _settings,
    _tensors,
)

TARGET = Target(
    "gptq",
    export,
    profiles=("gptq",),
    doc="a GPTQ checkpoint for vLLM, GPTQModel and transformers",
    options={"checkpoint_format": ("auto", "gptq", "gptq_v2"), **OPTIONS},
    open_options=OPEN_OPTIONS,
)
