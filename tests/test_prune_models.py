"""Pruning on every public architecture, and its order of methods on a real language model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
import zoo
from captured import captured
from planish.demo_models import demo_text
from planish.ir.encoded import Encoded
from planish.ir.interpret import run
from planish.ir.numerics import perplexity
from planish.passes.pack_sparse import PackSparse
from planish.passes.pipeline import Pipeline
from planish.passes.prune_magnitude import PruneMagnitude
from planish.passes.prune_plan import WeightPruner
from planish.passes.prune_sparsegpt import PruneSparsegpt
from planish.passes.prune_wanda import PruneWanda
from saved_programs import saved_language_model

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("name", "attention"), zoo.CASES)
def test_every_architecture_is_pruned_and_packed_exactly(
    name: str, attention: zoo.Attention
) -> None:
    """What a pruner changes has the pattern, so that all of it is stored in half, bit for bit."""
    before = captured(name, attention)
    steps = [PruneSparsegpt(sparsity="2:4"), PackSparse()]
    line = Pipeline(steps, verify="numbers")
    after = line.run(before, calibration=[list(before.examples)])
    pruned, packed = after.history.records[-2:]
    changed = {rewrite.before for rewrite in pruned.applied}
    assert changed
    assert changed <= {rewrite.before for rewrite in packed.applied}
    assert all(isinstance(after.weights.entry(weight), Encoded) for weight in changed)


def test_better_methods_keep_a_real_model_more_fluent(smollm2_folder: Path) -> None:
    program = saved_language_model(smollm2_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_folder)
    ids = torch.tensor([tokenizer(demo_text())["input_ids"]])
    batches = [[part] for part in ids[:, :768].split(256, 1)]
    held_out = ids[:, 768:]
    found: list[float] = [perplexity(run(program, [held_out])[0], held_out)]
    methods: list[type[WeightPruner]] = [PruneSparsegpt, PruneWanda, PruneMagnitude]
    for method in methods:
        pruned = Pipeline([method(sparsity="2:4")]).run(program, calibration=batches)
        found.append(perplexity(run(pruned, [held_out])[0], held_out))
    assert found == sorted(found)
