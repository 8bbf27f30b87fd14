"""torchao's int8 under Inductor as contestants."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

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
    _eager().prepare(options, model, out)


def load(options: Told, model: Told, path: Path, threads: int) -> Any:
    """An engine of bench_worker."""
    import torch
    from torchao import quantization

    torch.set_num_threads(threads)
    eager = _eager()
    module = eager.read_model(model, path, dtype=getattr(torch, options["dtype"]))
    quantization.quantize_(module, getattr(quantization, options["config"])())
    decoder = model["kind"] == "decoder"
    return (eager.TorchDecoderEngine if decoder else eager.TorchEncoderEngine)(module, True)


def _eager() -> ModuleType:
    """planish's file on eager PyTorch, which imports nothing of planish."""
    file = Path(__file__).resolve().parents[2] / "bench_torch.py"
    spec = importlib.util.spec_from_file_location("bench_torch", file)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made
