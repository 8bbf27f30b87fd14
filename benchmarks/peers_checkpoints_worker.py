"""In the peers' environment: load a checkpoint with the package it is written for; its logits.

Usage: python peers_checkpoints_worker.py KIND FOLDER IDS.safetensors OUT.safetensors
KIND: transformers (compressed-tensors), gptqmodel (GPTQ, AWQ) or llama-cpp (GGUF). For all but the
last also the weights that the packages' own code unpacks, by layer.
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file


def main(kind: str, folder: str, ids_file: str, out: str) -> None:
    ids = load_file(ids_file)["ids"]
    made = {
        "transformers": _transformers,
        "transformers, unpacked": _transformers_unpacked,
        "gptqmodel": _gptqmodel,
        "llama-cpp": _llama_cpp,
    }
    found = made[kind](folder, ids)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, out)


def _transformers(folder: str, ids: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
    """Compressed until the first pass, as compressed-tensors keeps a model."""
    import transformers

    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        found = {"logits": model(ids, use_cache=False).logits}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            found[f"weight:{name}"] = module.weight.detach().float()
    return found


def _transformers_unpacked(folder: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Dense from the start: activations stay floats, and zero points have one shape only.

    Kept compressed, transformers 5.23 expects zero points in another shape than
    compressed-tensors 0.20 itself writes them.
    """
    from transformers import CompressedTensorsConfig

    return _transformers(folder, ids, quantization_config=CompressedTensorsConfig(dequantize=True))


def _gptqmodel(folder: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    from gptqmodel import BACKEND, GPTQModel

    # The plain torch backend, the one that runs on any CPU, in float16, which it asks for.
    awq = '"awq"' in (Path(folder) / "config.json").read_text()
    backend = BACKEND.TORCH_AWQ if awq else BACKEND.TORCH
    found = _autoawq_weights(folder) if awq else {}
    model: Any = GPTQModel.load(folder, device="cpu", backend=backend, dtype=torch.float16)
    for name, module in model.model.named_modules():
        if hasattr(module, "qweight") and not awq:
            found[f"weight:{name}"] = module.dequantize_weight().t().half()
    with torch.no_grad():
        found["logits"] = model.model(ids, use_cache=False).logits.float()
    return found


def _autoawq_weights(folder: str) -> dict[str, torch.Tensor]:
    """As AutoAWQ itself unpacks them; its package does not import beside this transformers."""
    place = importlib.util.find_spec("awq")
    assert place is not None and place.submodule_search_locations
    file = Path(place.submodule_search_locations[0]) / "utils" / "packing_utils.py"
    theirs = runpy.run_path(str(file))
    size = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    tensors = load_file(Path(folder) / "model.safetensors")
    found: dict[str, torch.Tensor] = {}
    for name in [name for name in tensors if name.endswith(".qweight")]:
        layer = name.removesuffix(".qweight")
        parts = [tensors[f"{layer}.{ending}"] for ending in ("qweight", "qzeros", "scales")]
        weight = theirs["dequantize_gemm"](*parts, 4, size["group_size"])
        found[f"weight:{layer}"] = weight.t().half()
    return found


def _llama_cpp(folder: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    from llama_cpp import Llama

    file = str(next(Path(folder).glob("*.gguf")))
    model = Llama(file, n_ctx=512, logits_all=True, verbose=False, n_threads=1)
    rows: list[np.ndarray] = []
    for row in ids.tolist():
        model.reset()
        model.eval(row)
        rows.append(np.array(model.scores[: len(row)]))
    return {"logits": torch.from_numpy(np.stack(rows)).float()}


if __name__ == "__main__":
    main(*sys.argv[1:])
