"""Decoding on int8 activations: the torch decoder and ONNX give what the whole text gives."""

from __future__ import annotations

from pathlib import Path

import cached_decoders
import pytest
import torch
from onnx_checks import exported
from planish.codegen.run_onnx import OnnxModel
from planish.decode_torch import TorchDecoder
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.kernels import plan_cpu
from planish.passes.insert_kv_cache import empty_past
from planish.passes.pipeline import Pipeline
from planish.passes.quantize_activations import QuantizeActivations
from planish.passes.quantize_weights import QuantizeWeights

IDS = [3, 17, 5, 9, 44, 8, 2, 30, 12]


def cached(scheme: str) -> Program:
    steps = [QuantizeWeights(), QuantizeActivations(scheme=scheme, threshold=3.0)]
    return Pipeline(steps, verify="structure").run(cached_decoders.cached("llama", "sdpa"))


@pytest.mark.skipif(plan_cpu.why_not() is not None, reason="no C compiler here")
@pytest.mark.parametrize("scheme", ["dynamic_token", "llm_int8"])
def test_tokens_one_by_one_give_what_the_text_gives(scheme: str) -> None:
    """By token, rounding does not depend on the pieces; outlier columns do, so those go whole."""
    program = cached(scheme)
    decoder = TorchDecoder(program)
    assert all("multiplies integers" in s for s in decoder.choices if "int8 activations" in s)
    pieces = [IDS] if scheme == "llm_int8" else [IDS[:4], IDS[4:5], IDS[5:]]
    found = torch.cat([decoder.advance(piece) for piece in pieces])
    past = empty_past(program, 1)
    exact = run(program, [torch.tensor([IDS]), *past], float64=True)[0][0]
    # A value next to a tie may take the neighbouring code.
    assert (found - exact).norm().item() <= 0.01 * exact.norm().item()


def test_a_cached_decoder_in_onnx(tmp_path: Path) -> None:
    program = cached("dynamic_token")
    flat = [torch.tensor([IDS]), *empty_past(program, 1)]
    folder = exported(program, tmp_path / "out", profile="standard")
    exact = run(program, flat, float64=True)[0]
    found = next(iter(OnnxModel(folder, threads=1)(*flat).values()))
    assert (found - exact).norm().item() <= 0.01 * exact.norm().item()
