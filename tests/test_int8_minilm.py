"""A real sentence encoder with int8 weights and activations keeps its embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import planish
import pytest
import torch
from planish import optimize, trace
from planish.codegen.torch_cpu import lower
from planish.recipes import read_recipe
from torch import Tensor

RECIPE = """
name: int8 by token
description: for this test
passes:
  - recipe: raise
  - fold_constants
  - quantize_weights
  - quantize_activations
  - fuse_qkv
"""


def embeddings(call: Any, mask: Tensor) -> Tensor:
    """Means over the tokens that count, of length one: [sentences, channels]."""
    hidden, weight = call(), mask.unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


@pytest.mark.slow
def test_embeddings_keep_their_directions(minilm_folder: Path) -> None:
    from transformers import AutoTokenizer

    text = (Path(planish.__file__).parent / "demo_text.txt").read_text(encoding="utf-8")
    sentences = [part.strip() for part in text.replace("\n", " ").split(". ")][:16]
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder)
    inputs = dict(tokenizer(sentences, return_tensors="pt", padding=True))
    program = trace(minilm_folder, (), inputs)
    done = optimize(program, recipe=read_recipe(RECIPE))
    module, flat = lower(done.program), program.flatten_inputs((), inputs)
    assert sum("multiplies integers" in s for s in module.meta["choices"]) >= 24
    with torch.no_grad():
        exact = embeddings(lambda: program(**inputs)[0], inputs["attention_mask"])
        found = embeddings(lambda: module(*flat)[0], inputs["attention_mask"])
    assert (exact * found).sum(-1).mean().item() >= 0.995
