"""Every target takes a program that was cut: Inductor, ONNX, with a KV cache, our own decoder.

A Triton package of one is in interpreted_packages.py, Hugging Face folders are in test_cut.py.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import planish
import pytest
import torch
import zoo
from cached_decoders import gap, raised, tokens
from captured import captured
from interpreted_packages import assert_as_good
from planish.api import Optimized
from planish.codegen.run_onnx import OnnxModel
from planish.codegen.torch_cpu import compile_program
from planish.decode_torch import TorchDecoder
from planish.ir.interpret import run
from planish.passes.cut import Cut
from planish.passes.insert_kv_cache import InsertKvCache, empty_past
from planish.passes.pipeline import Pipeline
from torch import Tensor

QUICK = ("llama", "gpt2", "t5", "vit")
NAMES = ("llama", "gpt2", "gemma2", "mixtral", "bert", "vit", "t5", "bart", "whisper", "mamba")


@cache
def cut(name: str) -> tuple[Optimized, list[Any]]:
    """A third of the FFN channels and half of the heads cut; inputs of another shape."""
    sample = zoo.build(name, zoo.ARCHITECTURES[name].attentions[0])
    program = captured(name, zoo.ARCHITECTURES[name].attentions[0])
    options = {"cut.ffn": 0.34, "cut.heads": 0.5}
    made = planish.optimize(program, recipe="cut", options=options)
    assert made.program.parameter_count() < program.parameter_count()
    return made, list(program.flatten_inputs((), sample.other_inputs()))


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_compiled(name: str) -> None:
    made, inputs = cut(name)
    with torch.no_grad():
        assert_as_good(made.program, inputs, list(compile_program(made.program)(*inputs)))


@pytest.mark.parametrize("name", NAMES)
def test_onnx(name: str, tmp_path: Path) -> None:
    made, inputs = cut(name)
    model = OnnxModel(made.export(tmp_path / "onnx"))
    found: dict[str, Tensor] = model(*inputs)
    assert_as_good(made.program, inputs, list(found.values()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral", "deepseek_v3"])
def test_decoding_with_a_cache(name: str) -> None:
    """Token by token equals the whole text; one head group less in every cache."""
    whole = Pipeline([Cut(ffn=0.34, heads=0.5)]).run(
        raised(name, zoo.ARCHITECTURES[name].attentions[0])
    )
    program = Pipeline([InsertKvCache()]).run(whole)
    ids = tokens(2, 9)
    wanted = run(whole, [ids], float64=True)[0]
    past, found = empty_past(program, 2), list[Tensor]()
    for place in range(ids.shape[1]):
        logits, *past = run(program, [ids[:, place : place + 1], *past], float64=True)
        found.append(logits)
    assert gap(torch.cat(found, 1), wanted) <= 1e-12
    own = gap(run(whole, [ids[:1]])[0], wanted[:1])
    decoder = TorchDecoder(program)
    rows = torch.cat([decoder.advance([token]) for token in ids[0].tolist()])
    assert gap(rows.unsqueeze(0), wanted[:1]) <= 8 * own
