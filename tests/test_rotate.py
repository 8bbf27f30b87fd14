"""rotate and fold_norms: another basis for the residual stream and the value heads, folded."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import build
import pytest
import torch
import zoo
from captured import captured
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.ir.errors import WrongOption
from planish.ir.hadamard import hadamard, rotation
from planish.ir.interpret import run
from planish.ir.numerics import relative_error
from planish.ir.pattern import op
from planish.ir.program import Program
from planish.ir.residual_stream import residual_streams
from planish.ir.scale_edges import scale_edges
from planish.ir.text import program_text
from planish.passes.center_norms import CenterNorms
from planish.passes.fold_norms import FoldNorms
from planish.passes.pipeline import Pipeline
from planish.passes.rotate import Rotate
from planish.recipes import pipeline
from torch import Tensor

ROTATED = ("llama", "gemma", "phi3", "mixtral", "deepseek_v3", "gpt_oss")
DECLINED = {
    "gemma2": "joins it with other values (a residual)",  # norms write into the stream
    "t5": "is returned by the program",
    "bert": "is returned by the program",
}
RMS_NORM = torch.ops.planish.rms_norm.default


def raised(name: str) -> Program:
    attention = zoo.ARCHITECTURES[name].attentions[0]
    return pipeline("raise", verify="structure").run(captured(name, attention))


def rotated(program: Program, **options: Any) -> Program:
    """The pipeline holds the outputs to the contract, in float64 and natively."""
    step = Rotate().with_options(options)
    probes = [list(program.examples)]
    return Pipeline([step], verify="numbers", on_break="raise").run(program, probes=probes)


@pytest.mark.parametrize("name", ROTATED)
def test_streams_and_heads_are_rotated(name: str) -> None:
    program = raised(name)
    after = rotated(program)
    record = after.history.records[-1]
    assert not record.declined
    notes = [applied.note for applied in record.applied]
    assert any(note == "residual stream, Hadamard with random signs" for note in notes)
    assert any(note.startswith("value heads, ") for note in notes)
    assert calls(after) == calls(program)
    for kept in ("model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight"):
        old, new = program.weights[kept], after.weights[kept]
        assert not torch.allclose(old, new, rtol=0.1) and old.norm() == pytest.approx(
            float(new.norm()), rel=1e-5
        )


def calls(program: Program) -> set[str]:
    return {node.name for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("name", ["gpt2", "opt", "cohere"])
def test_layer_norms_become_rms_norms_first(name: str) -> None:
    after = rotated(raised(name))
    record = after.history.records[-1]
    notes = [applied.note for applied in record.applied]
    assert not record.declined and "was a LayerNorm" in notes
    assert "residual stream, Hadamard with random signs" in notes
    assert sum(node.target is RMS_NORM for node in after.graph.nodes) >= 3


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("bloom", "a norm writes into the stream"),
        ("distilbert", "is returned by the program"),
        ("whisper", ""),
    ],
)
def test_center_norms_alone(name: str, sentence: str) -> None:
    """Every replaced norm is held to its contract too; the streams that stay say why."""
    program = raised(name)
    step = CenterNorms()
    probes = [list(program.examples)]
    after = Pipeline([step], verify="numbers", on_break="raise").run(program, probes=probes)
    record = after.history.records[-1]
    if sentence:
        assert not record.applied and sentence in record.declined[0].reason
    else:
        norms = [node for node in after.graph.nodes if node.target is RMS_NORM]
        assert len(norms) == 7  # the decoder's; the encoder starts behind a convolution


@pytest.mark.parametrize("name", DECLINED)
def test_streams_that_cannot_be_rotated_say_why(name: str) -> None:
    after = rotated(raised(name), heads=False)
    record = after.history.records[-1]
    assert not record.applied and DECLINED[name] in record.declined[0].reason


def test_a_tied_head_gets_a_copy_and_the_history_says_so() -> None:
    program = raised("gemma")
    table = "model.embed_tokens.weight"
    assert program.weights.canonical("lm_head.weight") == table
    after = rotated(program)
    assert after.weights.canonical("lm_head.weight") == "lm_head.weight"
    notes = [a.note for a in after.history.records[-1].applied]
    assert f"{table} was tied; its 1 product reads a copy now" in notes
    kept = rotated(program, residual=False)
    assert kept.weights.canonical("lm_head.weight") == table


def test_seeds_and_kinds_differ() -> None:
    program = raised("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    made = [rotated(program, seed=seed, kind=kind).weights[name] for seed, kind in KINDS]
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in pairwise(made))
    with pytest.raises(WrongOption, match="kind cannot be 'dct'"):
        Rotate(kind="dct")


KINDS = ((0, "hadamard"), (1, "hadamard"), (0, "random"))


def test_outliers_are_spread() -> None:
    """One channel of the stream is 40 times the others; after rotation none stands out."""
    program = stream(outlier=40.0)
    after = rotated(program)

    def peak(of: Program) -> float:
        x = of.weights["table"]
        return float(x.abs().amax() / x.square().mean().sqrt())

    assert peak(program) > 4 and peak(after) < 0.7 * peak(program)


def stream(
    outlier: float = 1.0,
    middle: Any = None,
    norm: float = 0.5,
    dtype: torch.dtype = torch.float32,
) -> Program:
    """table [11, 12], norm, linear [5, 12], relu, linear [12, 5], sum, norm, head [7, 12]."""
    generator = torch.Generator().manual_seed(4)
    weights = {
        "table": torch.randn(11, 12, generator=generator),
        "n1": torch.rand(12, generator=generator) + norm,
        "a": torch.randn(5, 12, generator=generator),
        "b": torch.randn(12, 5, generator=generator),
        "n2": torch.rand(12, generator=generator) + norm,
        "head": torch.randn(7, 12, generator=generator),
    }
    weights["table"][:, 3] *= outlier
    weights = {name: value.to(dtype) for name, value in weights.items()}

    def body(ids: Any, table: Any, n1: Any, a: Any, b: Any, n2: Any, head: Any) -> Any:
        x = op.embedding(table, ids)
        x = middle(x) if middle else x
        y = op.linear(op.relu(op.linear(op.rms_norm(x, n1, 1e-5), a)), b)
        return op.linear(op.rms_norm(op.add(x, y), n2, 1e-5), head)

    ids = torch.arange(6).reshape(2, 3)
    program = build.program(body, {"ids": ids}, weights)
    program.facts |= {"raised"}
    return program


NEAR_MISSES = {
    "bias": (lambda x: op.add(x, 1.0), "add %add_tensor adds what is not of the stream"),
    "relu": (op.relu, "relu %relu_default does not treat all channels alike"),
    "mean": (
        lambda x: op.sub(x, op.mean(x, [-1], True)),
        "mean.dim %mean_dim does not treat all channels alike",
    ),
    "flip": (lambda x: op.add(x, op.flip(x, [-1])), "no residual stream starts at a table"),
    "halves": (
        lambda x: op.cat([op.slice(x, -1, 6, 12), op.slice(x, -1, 0, 6)], -1),
        "has the channels in another order or place",
    ),
    "square": (lambda x: op.mul(x, x), "mul %mul_tensor gives channels different factors"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_told(name: str) -> None:
    middle, sentence = NEAR_MISSES[name]
    after = rotated(stream(middle=middle))
    record = after.history.records[-1]
    assert not record.applied and sentence in record.declined[0].reason


def test_factors_for_all_channels_pass() -> None:
    after = rotated(stream(middle=lambda x: op.mul(x, 3.5)))
    assert not after.history.records[-1].declined


def test_fold_norms_golden() -> None:
    program = stream(norm=-0.5)  # some weights are negative
    after = Pipeline([FoldNorms()], verify="numbers").run(program, probes=[list(program.examples)])
    assert program_text(after) == program_text(program)
    assert bool((after.weights["n1"] == 1).all()) and bool((after.weights["n2"] == 1).all())
    wanted = (program.weights["a"].double() * program.weights["n1"].double()).float()
    assert torch.equal(after.weights["a"], wanted)
    assert not any(e.producers[0].what == "norm" and not e.free for e in scale_edges(after))


def test_fold_norms_leaves_what_something_else_reads() -> None:
    program = raised("bert")
    after = Pipeline([FoldNorms()]).run(program)
    record = after.history.records[-1]
    assert not record.applied
    assert any("(a residual)" in declined.reason for declined in record.declined)


def test_fold_norms_unties_when_told() -> None:
    program = raised("gemma")
    probes = [list(program.examples)]
    plain = Pipeline([FoldNorms()], verify="numbers").run(program, probes=probes)
    assert not bool((plain.weights["model.norm.weight"] == 0).all())
    assert bool((plain.weights["model.layers.0.input_layernorm.weight"] == 0).all())
    free = Pipeline([FoldNorms(untie=True)], verify="numbers").run(program, probes=probes)
    assert bool((free.weights["model.norm.weight"] == 0).all())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 130), st.integers(0, 5), st.booleans())
def test_rotations_are_orthogonal(size: int, seed: int, random: bool) -> None:
    matrix, _ = rotation(size, torch.Generator().manual_seed(seed), random)
    one = torch.eye(size, dtype=torch.float64)
    assert float((matrix @ matrix.t() - one).abs().max()) < 1e-12


@pytest.mark.parametrize("size", [1, 2, 12, 20, 28, 36, 48, 60, 64, 76, 576, 768, 960, 1536])
def test_hadamard_sizes(size: int) -> None:
    found = hadamard(size)
    assert found is not None and bool((found.abs() == 1).all())
    assert torch.equal(found @ found.t(), size * torch.eye(size, dtype=torch.float64))


def test_hadamard_is_not_known_for_all_sizes() -> None:
    assert hadamard(3) is None and hadamard(10) is None and hadamard(92) is None


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 30))
def test_in_float64_nothing_changes_but_the_last_bits(seed: int) -> None:
    program = stream(outlier=3.0, dtype=torch.float64)
    inputs: list[Tensor] = list(program.examples)
    after = Pipeline([Rotate(seed=seed, kind="random")]).run(program)
    wanted, found = (run(p, inputs)[0] for p in (program, after))
    assert relative_error(found, wanted) < 1e-13
    assert not torch.allclose(after.weights["head"], program.weights["head"], rtol=0.1)


def test_streams_of_an_encoder_and_a_decoder() -> None:
    (only,) = residual_streams(raised("t5"))  # both start at one table
    assert only.channels == 48 and len(only.norms) == 12
