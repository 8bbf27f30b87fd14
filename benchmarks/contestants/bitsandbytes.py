"""bitsandbytes' LLM.int8 in eager PyTorch as a contestant."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench_worker import sibling

Told = Mapping[str, Any]

IMPORTS = ["torch", "transformers.models.auto.modeling_auto", "bitsandbytes"]
PACKAGES = ["bitsandbytes", "torch", "transformers", "accelerate"]
CONTESTANTS: list[dict[str, Any]] = [
    {
        "name": "bitsandbytes int8",
        "kind": kind,
        "heat": "int8",
        "bits": 8,
        "head_bits": 32,
        "compute": "int8",
    }
    for kind in ("decoder", "encoder")
]


def prepare(options: Told, model: Told, out: Path) -> None:
    """Quantizing is part of loading."""
    sibling("bench_torch").prepare(options, model, out)


def load(options: Told, model: Told, path: Path, threads: int) -> Any:
    """An engine of bench_worker."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    eager = sibling("bench_torch")
    settings = transformers.BitsAndBytesConfig(load_in_8bit=True)
    module = eager.read_model(model, path, quantization_config=settings, device_map="cpu")
    decoder = model["kind"] == "decoder"
    return (eager.TorchDecoderEngine if decoder else eager.TorchEncoderEngine)(module, False)
