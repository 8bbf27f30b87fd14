"""Let llm-compressor prune SmolLM2-135M on our slices, and write its weights.

    PEERS/bin/python benchmarks/peers_sparsity.py --method sparsegpt --sparsity 2:4 \
        --model FOLDER --slices slices.safetensors --calibration 32 --out sparse.safetensors
    python benchmarks/quality.py --weights sparse.safetensors

Runs in an environment of the peer's own, without planish; `quality.py` then measures every
contestant the same way. Prints processor seconds, wall seconds and peak memory of the pruning.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from peer_weights import Weights, write_peer_weights
from torch import Tensor
from transformers import AutoModelForCausalLM

_METHODS = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=sorted(_METHODS), required=True)
    parser.add_argument("--sparsity", default="50%", help="50%% or 2:4")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--slices", type=Path, required=True)
    parser.add_argument("--calibration", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    write_peer_weights(
        lambda ids: pruned(options.model, options.method, options.sparsity, ids),
        {"peer": "llmcompressor", "method": options.method, "sparsity": options.sparsity},
        slices=options.slices,
        calibration=options.calibration,
        out=options.out,
        look=share_of_zeros,
    )


def share_of_zeros(weights: Weights) -> dict[str, float]:
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    return {"zeros": round(zeros / sum(weight.numel() for weight in weights.values()), 4)}


def pruned(folder: Path, method: str, sparsity: str, ids: Tensor) -> dict[str, Tensor]:
    """The weights of all linears in the blocks, pruned; the head stays, as the peer advises."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    groups = ":" in sparsity
    rate = 0.5 if groups else float(sparsity.rstrip("%")) / 100
    recipe = _METHODS[method](
        sparsity=rate,
        mask_structure=sparsity if groups else "0:0",
        targets=["Linear"],
        ignore=["re:.*lm_head"],
    )
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=recipe,
        num_calibration_samples=len(rows),
        max_seq_length=ids.shape[1],
    )
    found = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    return {name: weight for name, weight in found.items() if "layers." in name}


if __name__ == "__main__":
    main()
