"""LLM.int8 on a model with planted outlier features, where plain int8 fails.

Every norm that linears read gets some channels scaled up, and those columns of its readers scaled
down: the same function, but each token now holds features a thousand times larger than the others.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import planish
import pytest
import torch
import transformers
from planish.codegen.torch_cpu import lower
from planish.ir.capture import capture_module
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.passes.calibrate import product_sites
from planish.passes.contract import Pass
from planish.passes.pipeline import Pipeline
from planish.passes.quantize_activations import QuantizeActivations
from planish.passes.quantize_salient import QuantizeSalient
from planish.passes.quantize_weights import QuantizeWeights
from planish.recipes import pipeline
from torch import Tensor

LENGTH, PLANTED, TIMES = 64, 3, 1000.0


@functools.cache
def text() -> Tensor:
    words = (Path(planish.__file__).parent / "demo_text.txt").read_bytes()
    words += (Path(planish.__file__).parent / "README.md").read_bytes()
    return torch.tensor(list(words), dtype=torch.int64)


def batch(draw: torch.Generator, count: int) -> Tensor:
    starts = torch.randint(0, len(text()) - LENGTH, (count,), generator=draw)
    return torch.stack([text()[start : start + LENGTH] for start in starts.tolist()])


@functools.cache
def trained() -> Program:
    """A byte-level model that has learned something: int8 would cost it next to nothing."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(1)
    for _ in range(120):
        ids = batch(draw, 8)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids = batch(draw, 2)
    return pipeline("raise").run(capture_module(model.eval(), (), {"input_ids": ids}))


def planted() -> Program:
    program = trained().copy()
    draw = torch.Generator().manual_seed(2)
    for site in product_sites(program):
        if site.value.target is not torch.ops.planish.rms_norm.default:
            continue
        name = str(site.value.args[1].target)  # type: ignore[union-attr]
        weight = program.weights[name]
        factor = torch.ones_like(weight)
        factor[torch.randperm(len(weight), generator=draw)[:PLANTED]] = TIMES
        program.weights[name] = weight * factor
        for product in site.products:
            program.weights[product.weight] = program.weights[product.weight] / factor
    return program


def evaluation() -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [batch(draw, 8) for _ in range(4)]


def perplexity(logits: list[Tensor]) -> float:
    losses = [
        torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        for found, ids in zip(logits, evaluation(), strict=True)
    ]
    return math.exp(sum(loss.item() for loss in losses) / len(losses))


def measured(*steps: Pass) -> float:
    """The perplexity of the planted model after the passes, in the torch target's kernels."""
    batches = [[batch(torch.Generator().manual_seed(4), 4)]]
    program = Pipeline(steps).run(planted(), calibration=batches) if steps else planted()
    module = lower(program)
    with torch.no_grad():
        return perplexity([module(ids)[0] for ids in evaluation()])


@pytest.mark.slow
def test_plain_int8_fails_and_llm_int8_keeps_three_digits() -> None:
    float_perplexity = perplexity([run(trained(), [ids])[0] for ids in evaluation()])
    assert measured() == pytest.approx(float_perplexity, rel=1e-4)
    plain = measured(QuantizeWeights(), QuantizeActivations())
    assert plain > 1.1 * float_perplexity
    columns = QuantizeSalient(bits=8, group_size=None, fraction=0.06)
    kept = measured(columns, QuantizeActivations(scheme="llm_int8"))
    assert f"{kept:.3g}" == f"{float_perplexity:.3g}", (float_perplexity, plain, kept)
    print(f"float {float_perplexity:.4f}, int8 {plain:.4f}, llm_int8 {kept:.4f}")
