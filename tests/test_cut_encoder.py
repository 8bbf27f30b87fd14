"""cut_encoder: two programs that together compute what the whole encoder-decoder computes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import zoo
from captured import captured, sample
from planish.codegen.run_onnx import OnnxModel
from planish.codegen.target import export_program
from planish.ir.capture import capture_module
from planish.ir.errors import WrongOption
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.ir.program_folder import load_program, save_program
from planish.ir.text import program_text
from planish.passes.contract import Context
from planish.passes.cut_encoder import CutEncoder, split_encoder
from planish.passes.cut_encoder_flow import CannotCut
from planish.passes.pipeline import Pipeline
from planish.recipes import pipeline
from torch import Tensor, nn
from torch.export import Dim

CASES: list[tuple[str, zoo.Attention]] = [
    (name, attention) for name, attention in zoo.CASES if name in ("t5", "bart", "whisper")
]
HEAD = {"t5": 10, "bart": 8, "whisper": 8}


@functools.cache
def raised(name: str, attention: zoo.Attention, masked: bool = True) -> Program:
    if masked:
        return pipeline("raise").run(captured(name, attention))
    made = sample(name, attention)
    kwargs = {key: value for key, value in made.kwargs.items() if key != "attention_mask"}
    return pipeline("raise").run(capture_module(made.model, (), kwargs))


@functools.cache
def halves(name: str, attention: zoo.Attention, masked: bool = True) -> tuple[Program, Program]:
    return split_encoder(raised(name, attention, masked))


def wide(program: Program, **kwargs: Any) -> Any:
    """A call in float64."""
    return program.unflatten_outputs(run(program, program.flatten_inputs((), kwargs), float64=True))


def narrowed(tree: Any) -> Any:
    return torch.utils._pytree.tree_map(
        lambda value: value.float() if value.is_floating_point() else value, tree
    )


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def source_and_text(inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    source = dict(inputs)
    return source, source.pop("decoder_input_ids")


@pytest.mark.parametrize(("name", "attention"), CASES)
@pytest.mark.parametrize("batch", [1, 3])
def test_decoder_of_encoder_is_the_whole(name: str, attention: zoo.Attention, batch: int) -> None:
    """Batch 3 has a padded source, so that a lost mask would show."""
    whole = raised(name, attention)
    encoder, decoder = halves(name, attention)
    inputs = sample(name, attention).other_inputs(batch=batch)
    source, text = source_and_text(inputs)
    wanted = wide(whole, **inputs)
    flat = run(encoder, encoder.flatten_inputs((), source), float64=True)
    given = decoder.in_spec.num_leaves - 1
    found = run(decoder, [text, *flat[-given:]], float64=True)
    assert relative(found[0], wanted["logits"]) < 1e-13
    assert relative(flat[0], wanted["encoder_last_hidden_state"]) < 1e-13
    result, cross = encoder(**source)
    assert list(result) == ["encoder_last_hidden_state"]
    logits = decoder(decoder_input_ids=text, **cross)["logits"]
    own = relative(whole(**inputs)["logits"], wanted["logits"])
    assert relative(logits, wanted["logits"]) <= 2 * own
