"""torchao's int8 under Inductor as contestants."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench_worker import sibling

Told = Mapping[str, Any]

IMPORTS = ["torch", "transformers.models.auto.modeling_auto", "torchao"]
PACKAGES = ["torchao", "torch", "transformers"]
_INT8 = {"heat": "int8", "bits": 8, "head_bits": 8}
_ROWS = [
    ("torchao int8 weights, bfloat16", "Int8WeightOnlyConfig", "bfloat16", "float32"),
    ("torchao int8 dynamic", "Int8DynamicActivationInt8WeightConfig", "float32", "int8"),
]
CONTESTANTS: list[dict[str, Any]] = [
    {
        "name": f"{name} + Inductor",
        "kind": kind,
        **_INT8,
        "compute": compute,
        "options": {"config": config, "dtype": dtype},
    }
    for kind in ("decoder", "encoder")
    for name, config, dtype, compute in _ROWS
]


def prepare(options: Told, model: Told, out: Path) -> None:
    """Quantizing is part of loading: the packed tensors are made from the model each time."""
    sibling("bench_torch").prepare(options, model, out)


def load(options: Told, model: Told, path: Path, threads: int) -> Any:
    """An engine of bench_worker."""
    import torch
    from torchao import quantization

    torch.set_num_threads(threads)
    eager = sibling("bench_torch")
    module = eager.read_model(model, path, dtype=getattr(torch, options["dtype"]))
    quantization.quantize_(module, getattr(quantization, options["config"])())
    decoder = model["kind"] == "decoder"
    return (eager.TorchDecoderEngine if decoder else eager.TorchEncoderEngine)(module, True)
