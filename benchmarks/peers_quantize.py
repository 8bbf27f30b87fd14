"""Let one peer quantize SmolLM2-135M on our slices, and write its dequantized weights.

    PEERS/bin/python benchmarks/peers_quantize.py --method gptq --peer llmcompressor \
        --model FOLDER --slices slices.safetensors --calibration 32 --out gptq4.safetensors
    python benchmarks/quality.py --weights gptq4.safetensors

Runs in an environment of the peers' own, without planish; `quality.py` then measures every
contestant the same way. Prints processor seconds, wall seconds and peak memory of the quantizing.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peer_weights import write_peer_weights
from torch import Tensor
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", choices=sorted(PEERS), required=True)
    parser.add_argument("--method", default="gptq", help="gptq, rtn, awq or smooth-w8a8")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--slices", type=Path, required=True)
    parser.add_argument("--calibration", type=int, default=32)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    write_peer_weights(
        lambda ids: PEERS[options.peer](options, ids),
        {
            "peer": options.peer,
            "method": options.method,
            "bits": options.bits,
            "group": options.group,
        },
        slices=options.slices,
        calibration=options.calibration,
        out=options.out,
    )


def _model(options: argparse.Namespace) -> Any:
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()


def _blocks(model: Any) -> dict[str, Tensor]:
    """The dense weights of all linears in the blocks."""
    kinds = (torch.nn.Linear,)
    found = {
        f"{name}.weight": m.weight for name, m in model.named_modules() if isinstance(m, kinds)
    }
    return {name: weight for name, weight in found.items() if "layers." in name}


def llmcompressor(options: argparse.Namespace, ids: Tensor) -> dict[str, Tensor]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    model = _model(options)
    arguments = QuantizationArgs(
        num_bits=options.bits,
        type="int",
        strategy="group",
        group_size=options.group,
        symmetric=not options.asymmetric,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    groups = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]
    if options.method == "rtn":
        oneshot(model=model, recipe=QuantizationModifier(**groups))
    else:
        oneshot(
            model=model,
            dataset=Dataset.from_list(rows),
            recipe=GPTQModifier(**groups),
            num_calibration_samples=len(rows),
            max_seq_length=ids.shape[1],
        )
    return _blocks(model)


def hqq(options: argparse.Namespace, ids: Tensor) -> dict[str, Tensor]:
    from hqq.core.quantize import Quantizer

    model = _model(options)
    found: dict[str, Tensor] = {}
    for name, weight in _blocks(model).items():
        codes, meta = Quantizer.quantize(
            weight.detach(),
            nbits=options.bits,
            group_size=options.group,
            axis=1,
            optimize=True,
            compute_dtype=torch.float32,
            device="cpu",
        )
        found[name] = Quantizer.dequantize(codes, meta).reshape(weight.shape)
    return found


def gptqmodel(options: argparse.Namespace, ids: Tensor) -> dict[str, Tensor]:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it does not start with one
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=options.bits, group_size=options.group, sym=not options.asymmetric)
    model = GPTQModel.load(str(options.model), config)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]
    model.quantize(rows, batch_size=1)
    found: dict[str, Tensor] = {}
    for name, module in model.model.named_modules():
        if hasattr(module, "dequantize_weight"):
            found[f"{name}.weight"] = module.dequantize_weight().T
    return found


PEERS: dict[str, Callable[[argparse.Namespace, Tensor], dict[str, Tensor]]] = {
    "llmcompressor": llmcompressor,
    "hqq": hqq,
    "gptqmodel": gptqmodel,
}

if __name__ == "__main__":
    main()
