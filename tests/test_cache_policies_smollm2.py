"""Compressed and streaming caches on a real language model: what they do to its predictions."""

from __future__ import annotations

import functools
from pathlib import Path

import planish
import pytest
import torch
import transformers
from planish.demo_models import demo_text
from planish.ir.numerics import kl_divergence, perplexity
from planish.ir.program import Program
from planish.passes.contract import Pass
from planish.passes.insert_kv_cache import InsertKvCache
from planish.passes.measure_cache import run_in_pieces
from planish.passes.pipeline import Pipeline
from planish.passes.quantize_kv_cache import QuantizeKvCache
from planish.passes.stream_kv_cache import StreamKvCache
from planish.recipes import pipeline
from torch import Tensor

pytestmark = pytest.mark.slow
LENGTH, PIECE = 384, 32


@functools.cache
def model(folder: Path) -> tuple[Program, Tensor, Tensor]:
    """The cached program, a text, and the logits of the whole cache."""
    plain = planish.trace(folder, kv_cache=True)
    program = Pipeline([InsertKvCache()]).run(pipeline("raise").run(plain))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(demo_text())["input_ids"][:LENGTH]])
    return program, ids, logits(program, ids)


def logits(program: Program, ids: Tensor) -> Tensor:
    return run_in_pieces(program, [ids], range(PIECE, LENGTH + 1, PIECE))


def changed(folder: Path, step: Pass) -> tuple[Tensor, Tensor, Tensor]:
    """The text, and logits of the whole and of the changed cache."""
    program, ids, exact = model(folder)
    return ids, exact, logits(Pipeline([step]).run(program), ids)


@pytest.mark.parametrize(
    ("step", "agreement", "divergence"),
    [(QuantizeKvCache(), 0.95, 0.002), (QuantizeKvCache(4, 32, 32), 0.9, 0.02)],
)
def test_coded_caches_predict_the_same(
    smollm2_folder: Path, step: Pass, agreement: float, divergence: float
) -> None:
    ids, exact, found = changed(smollm2_folder, step)
    same = (found.argmax(-1) == exact.argmax(-1)).double().mean()
    assert same >= agreement
    assert 0 < kl_divergence(exact, found) <= divergence
    assert perplexity(found, ids) <= 1.02 * perplexity(exact, ids)


def test_streaming_far_beyond_its_window_stays_fluent(smollm2_folder: Path) -> None:
    """A third of the text is kept; without the first tokens the model breaks, as in the paper."""
    ids, exact, found = changed(smollm2_folder, StreamKvCache(4, 92))
    whole = perplexity(exact[:, 128:], ids[:, 128:])
    assert perplexity(found[:, 128:], ids[:, 128:]) <= 1.25 * whole
    *_, without = changed(smollm2_folder, StreamKvCache(0, 96))
    assert perplexity(without[:, 128:], ids[:, 128:]) >= 1.6 * whole
