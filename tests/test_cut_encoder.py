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
from planish.passes.cut_encoder import CutEncoder, split_encoder
from planish.passes.cut_encoder_flow import CannotCut
from planish.passes.insert_kv_cache import InsertKvCache, empty_past
from planish.passes.pipeline import Pipeline
from planish.recipes import pipeline
from torch import Tensor, nn
from torch.export import Dim

CASES = [
    pytest.param(name, attention, marks=pytest.mark.slow if slow else ())
    for name, attention, slow in (
        ("t5", "sdpa", False),
        ("t5", "eager", True),
        ("bart", "sdpa", False),
        ("bart", "eager", False),
        ("whisper", "sdpa", False),
        ("whisper", "eager", True),
    )
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


@functools.cache
def cached_decoder(name: str) -> Program:
    return Pipeline([InsertKvCache()]).run(halves(name, "sdpa")[1])


def wide(program: Program, **kwargs: Any) -> Any:
    """A call in float64."""
    return program.unflatten_outputs(run(program, program.flatten_inputs((), kwargs), float64=True))


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


def test_without_a_padding_mask_nothing_but_keys_and_values_crosses() -> None:
    whole = raised("t5", "sdpa", masked=False)
    encoder, decoder = halves("t5", "sdpa", masked=False)
    inputs = sample("t5", "sdpa").other_inputs(batch=1)
    del inputs["attention_mask"]
    source, text = source_and_text(inputs)
    pairs = [f"cross_{kind}_{place}" for place in range(2) for kind in ("key", "value")]
    assert [spec.name for spec in decoder.input_specs] == ["decoder_input_ids", *pairs]
    flat = run(encoder, encoder.flatten_inputs((), source), float64=True)
    found = run(decoder, [text, *flat[1:]], float64=True)
    assert relative(found[0], wide(whole, **inputs)["logits"]) < 1e-13


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_the_interface_of_both_halves(name: str, attention: zoo.Attention) -> None:
    encoder, decoder = halves(name, attention)
    inputs = sample(name, attention).kwargs
    assert [spec.name for spec in encoder.input_specs] == [
        key for key in inputs if key != "decoder_input_ids"
    ]
    masks = ["cross_mask"] if "attention_mask" in inputs else []
    pairs = [f"cross_{kind}_{place}" for place in range(2) for kind in ("key", "value")]
    assert [spec.name for spec in decoder.input_specs] == ["decoder_input_ids", *pairs, *masks]
    length = 13 if name == "whisper" else None
    forms = {spec.name: spec.shape for spec in decoder.input_specs}
    assert all(forms[pair] == (None, 6, length, HEAD[name]) for pair in pairs)
    layer = {"kv_heads": 6, "head": HEAD[name], "value_head": HEAD[name], "dtype": "float32"}
    told = {"layers": [layer, layer], "names": [*pairs, *masks]}
    assert decoder.metadata["cross"] == {"part": "decoder", **told}
    assert encoder.metadata["cross"] == {"part": "encoder", **told}
    shared = set(encoder.weights) & set(decoder.weights)
    tables = {"t5": {"shared.weight"}, "bart": {"model.shared.weight"}, "whisper": set[str]()}
    assert shared == tables[name]  # no weight is kept that its half does not read


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_saved_halves_are_the_same(name: str, tmp_path: Path) -> None:
    encoder, decoder = halves(name, "sdpa")
    for part, program in (("encoder", encoder), ("decoder", decoder)):
        save_program(program, tmp_path / part)
        again = load_program(tmp_path / part)
        assert program_text(again) == program_text(program)
        assert again.metadata["cross"] == program.metadata["cross"]
        for old, new in zip(
            run(program, program.examples), run(again, again.examples), strict=True
        ):
            assert torch.equal(old, new)


class _Translator(nn.Module):
    """A source of width 12, one cross attention of 2 heads, 5 wide; `leak` adds other paths."""

    def __init__(self, leak: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.leak = leak
        self.source_table, self.text_table = nn.Embedding(11, 12), nn.Embedding(13, 14)
        self.query, self.key, self.value = nn.Linear(14, 10), nn.Linear(12, 10), nn.Linear(12, 10)
        self.head = nn.Linear(10, 13)

    def forward(self, source: Tensor, text: Tensor) -> Tensor:
        seen, spoken = self.source_table(source), self.text_table(text)
        if self.leak == "text feeds the source":
            seen = seen + spoken.mean((1, 2))[:, None, None]
        if self.leak == "keys of another table":
            seen = self.source_table(torch.arange(7)).expand(source.shape[0], 7, 12)
        q, k, v = (
            linear(x).unflatten(-1, (2, 5)).transpose(1, 2)
            for linear, x in ((self.query, spoken), (self.key, seen), (self.value, seen))
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)
        out = mixed.transpose(1, 2).flatten(2)
        if self.leak == "a state crosses":
            out = out * seen.mean((1, 2))[:, None, None]
        if self.leak == "ids cross":
            out = out + source.sum(1)[:, None, None] + source[:, :1, None]
        return self.head(out)


@functools.cache
def translator(leak: str = "") -> Program:
    generator = torch.Generator().manual_seed(3)
    source = torch.randint(0, 11, (2, 7), generator=generator)
    text = torch.randint(0, 13, (2, 4), generator=generator)
    free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    shapes = {"source": free, "text": free}
    program = capture_module(_Translator(leak), (), {"source": source, "text": text}, shapes)
    return pipeline("raise").run(program)


ENCODER = """\
%source : i64[n0, n1]
%sym_size = sym_size(%source, 0) : int n0
%sym_size_1 = sym_size(%source, 1) : int n1
%source_table = embedding(%source_table.weight, %source) : f32[n0, n1, 12]
%key = linear(%source_table, %key.weight, %key.bias) : f32[n0, n1, 10]
%reshape = reshape(%key, [%sym_size, %sym_size_1, 2, 5]) : f32[n0, n1, 2, 5]
%transpose = transpose(%reshape, 1, 2) : f32[n0, 2, n1, 5]
%value = linear(%source_table, %value.weight, %value.bias) : f32[n0, n1, 10]
%reshape_1 = reshape(%value, [%sym_size, %sym_size_1, 2, 5]) : f32[n0, n1, 2, 5]
%transpose_1 = transpose(%reshape_1, 1, 2) : f32[n0, 2, n1, 5]
return [%transpose, %transpose_1]"""
DECODER = """\
%text : i64[n0, n1]
%cross_key_0 : f32[n0, 2, n2, 5]
%cross_value_0 : f32[n0, 2, n2, 5]
%sym_size = sym_size(%text, 0) : int n0
%sym_size_1 = sym_size(%text, 1) : int n1
%text_table = embedding(%text_table.weight, %text) : f32[n0, n1, 14]
%query = linear(%text_table, %query.weight, %query.bias) : f32[n0, n1, 10]
%reshape = reshape(%query, [%sym_size, %sym_size_1, 2, 5]) : f32[n0, n1, 2, 5]
%transpose = transpose(%reshape, 1, 2) : f32[n0, 2, n1, 5]
%attention = attention(%transpose, %cross_key_0, %cross_value_0, scale=0.5) : f32[n0, 2, n1, 5]
%transpose_1 = transpose(%attention, 1, 2) : f32[n0, n1, 2, 5]
%reshape_1 = reshape(%transpose_1, [%sym_size, %sym_size_1, 10]) : f32[n0, n1, 10]
%head = linear(%reshape_1, %head.weight, %head.bias) : f32[n0, n1, 13]
return [%head]"""


def test_golden_halves() -> None:
    encoder, decoder = split_encoder(translator())
    assert program_text(encoder) == ENCODER
    assert program_text(decoder) == DECODER


def test_what_else_crosses_is_handed_over() -> None:
    whole = translator("a state crosses")
    encoder, decoder = split_encoder(whole)
    assert [spec.name for spec in decoder.input_specs] == [
        "text",
        "cross_key_0",
        "cross_value_0",
        "cross_state",
    ]
    source, text = whole.examples
    result, cross = encoder(source=source)
    assert result == () and cross["cross_state"].shape == (2, 1, 1)
    wanted = whole(source=source, text=text)
    assert relative(decoder(text=text, **cross), wanted) < 1e-6
    moved = {**cross, "cross_state": cross["cross_state"] * 2}
    assert relative(decoder(text=text, **moved), wanted) > 0.1


def test_several_states_are_numbered() -> None:
    whole = translator("ids cross")
    encoder, decoder = split_encoder(whole)
    source, text = whole.examples
    _, cross = encoder(source=source)
    assert list(cross) == ["cross", "cross_state_0", "cross_state_1"]
    assert relative(decoder(text=text, **cross), whole(source=source, text=text)) < 1e-6


def test_refusals_are_one_sentence() -> None:
    def refusal(program: Program) -> str:
        with pytest.raises(CannotCut) as caught:
            split_encoder(program)
        return caught.value.what

    assert "has no cross attention" in refusal(pipeline("raise").run(captured("llama", "sdpa")))
    assert "has no cross attention" in refusal(pipeline("raise").run(captured("bert", "sdpa")))
    assert "has no cross attention" in refusal(translator("keys of another table"))
    fed = refusal(translator("text feeds the source"))
    assert fed == (
        "the decoder's input text feeds the keys of the cross attention %attention_default, "
        "so they cannot be computed before decoding"
    )
    cached = translator().copy()
    cached.facts |= {"cached"}
    assert "has a KV cache already" in refusal(cached)
    with pytest.raises(WrongOption, match=r"cut_encoder\.keep cannot be 'both'"):
        CutEncoder(keep="both")


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
@pytest.mark.parametrize("batch", [1, 3])
def test_encoder_once_then_token_by_token(name: str, batch: int) -> None:
    """The full chain in float64, the source padded where there is a mask."""
    whole = raised(name, "sdpa")
    encoder, decoder = halves(name, "sdpa")
    cached = cached_decoder(name)
    inputs = sample(name, "sdpa").other_inputs(batch=batch)
    source, text = source_and_text(inputs)
    wanted = wide(whole, **inputs)["logits"]
    flat = run(encoder, encoder.flatten_inputs((), source), float64=True)
    crossing = flat[len(flat) - len(decoder.inputs) + 1 :]
    past: list[Any] = empty_past(cached, batch)
    assert len(past) == 4  # self-attention only
    found: list[Tensor] = []
    for place in range(text.shape[1]):
        logits, *past = run(cached, [text[:, place : place + 1], *crossing, *past], float64=True)
        found.append(logits)
    assert relative(torch.cat(found, 1), wanted) < 1e-12


def test_encoder_and_cached_decoder_run_in_onnxruntime(tmp_path: Path) -> None:
    """Two ONNX models of standard operators: the source once, then the text token by token."""
    encoder, cached = halves("t5", "sdpa")[0], cached_decoder("t5")
    whole = raised("t5", "sdpa")
    models: list[OnnxModel] = []
    for part, program in (("encoder", encoder), ("decoder", cached)):
        out = export_program(program, tmp_path / part, "onnx", profile="standard")
        onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
        graph = onnx.load(out / "model.onnx", load_external_data=False).graph
        assert {node.domain for node in graph.node} == {""}
        models.append(OnnxModel(out, threads=1))
    inputs = sample("t5", "sdpa").other_inputs(batch=3)
    source, text = source_and_text(inputs)
    crossing = models[0](**source)
    assert list(crossing) == ["encoder_last_hidden_state", *encoder.metadata["cross"]["names"]]
    del crossing["encoder_last_hidden_state"]
    forms = [f"past_key_values.{place}.{kind}" for place in range(2) for kind in ("key", "value")]
    past = dict(zip(forms, empty_past(cached, 3), strict=True))
    found: list[Tensor] = []
    for token in text.split(1, 1):
        logits, *present = models[1](decoder_input_ids=token, **crossing, **past).values()
        past = dict(zip(forms, present, strict=True))
        found.append(logits)
    wanted = wide(whole, **inputs)["logits"]
    own = relative(whole(**inputs)["logits"], wanted)
    assert relative(torch.cat(found, 1), wanted) <= 2 * own + torch.finfo(torch.float32).eps
