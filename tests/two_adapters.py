"""Two adapters of one tiny model, saved, of other ranks and modules; and what serves both."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import peft
import torch
import zoo
from planish.ir.capture import capture_module
from planish.ir.program import Program
from planish.passes.pipeline import Pipeline
from planish.passes.serve_adapters import ServeAdapters
from planish.recipes import pipeline


@functools.cache
def base(name: str) -> Program:
    made = zoo.build(name, "sdpa", layers=1)
    return pipeline("raise").run(capture_module(made.model, (), made.kwargs))


TARGETS = {
    "llama": (["q_proj", "down_proj"], ["v_proj", "q_proj", "lm_head"]),
    "gpt2": (["c_attn"], ["c_attn", "mlp.c_proj"]),
    "bert": (["query"], ["query", "output.dense"]),
}


def saved(name: str, folder: Path) -> list[Any]:
    """Two models of one base with adapters of other ranks, factors and modules."""
    models: list[Any] = []
    for place, modules in enumerate(TARGETS[name]):
        torch.manual_seed(place)
        config = peft.LoraConfig(
            r=2 + place,
            target_modules=modules,
            init_lora_weights=False,
            use_rslora=bool(place),
            alpha_pattern={modules[0]: 5},
            fan_in_fan_out=name == "gpt2",
        )
        model = peft.get_peft_model(zoo.build(name, "sdpa", layers=1).model, config).eval()
        model.save_pretrained(folder / str(place))
        models.append(model)
    return models


def served(program: Program, folder: Path) -> Program:
    return Pipeline([ServeAdapters(f"{folder / '0'}; {folder / '1'}")]).run(program)
