"""Norms, rotary embeddings, gates and GELUs of every public architecture are raised, all of them.

The expected counts are counted by hand from the architectures at two layers.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import zoo
from captured import captured, sample
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.ir.text import program_text
from planish.passes.canonicalize import Canonicalize
from planish.passes.pipeline import Pipeline, run_pass
from planish.passes.raise_gate import RaiseGate
from planish.passes.raise_gelu import RaiseGelu
from planish.passes.raise_norm import RaiseNorm
from planish.passes.raise_rotary import RaiseRotary

PASSES = (Canonicalize(), RaiseNorm(), RaiseRotary(), RaiseGelu(), RaiseGate())
DECODER = {"rms_norm": 5, "rotary": 4, "gated_mlp": 2}
ENCODER = {"layer_norm": 5, "gelu": 2}
EXPECTED: dict[str, dict[str, int]] = {
    "llama": DECODER,
    "qwen2": DECODER,
    "mistral": DECODER,
    "phi3": DECODER,
    "mixtral": DECODER,
    "gemma": DECODER | {"gelu": 2},
    "gemma2": DECODER | {"rms_norm": 9, "gelu": 2},  # norms before and after both blocks
    "gpt_oss": DECODER | {"gelu": 2},  # x * sigmoid(1.702 x) inside the gate
    "cohere": {"layer_norm": 7, "rotary": 4, "gated_mlp": 2},  # one norm a layer, two on q and k
    "deepseek_v3": {"rms_norm": 9, "rotary": 4, "gated_mlp": 3},  # dense, routed, shared
    "mamba": {"rms_norm": 3, "gated_mlp": 2},
    "gpt2": ENCODER,
    "bert": ENCODER,
    "distilbert": ENCODER,
    "vit": ENCODER,
    "bloom": {"layer_norm": 6, "gelu": 2},  # one more after the embedding
    "opt": {"layer_norm": 5},  # relu, no gate
    "t5": {"rms_norm": 12},  # 2 * 2 + 1 and 2 * 3 + 1; relu, no gate
    "bart": {"layer_norm": 12, "gelu": 4},
    "whisper": {"layer_norm": 12, "gelu": 6},  # two convolutions before the encoder
}


def probes(name: str, attention: zoo.Attention, program: Program) -> list[list[object]]:
    other = sample(name, attention).other_inputs()
    return [list(program.examples), program.flatten_inputs((), other)]


def test_every_architecture_is_expected() -> None:
    assert set(EXPECTED) == set(zoo.ARCHITECTURES)


@pytest.mark.parametrize(("name", "attention"), zoo.CASES)
def test_all_candidates_are_raised_and_hold_their_bound(
    name: str, attention: zoo.Attention
) -> None:
    program = captured(name, attention)
    shapes = probes(name, attention, program)
    raised = Pipeline(PASSES, verify="numbers", on_break="raise").run(program, shapes)
    records = [record for record in raised.history if record.name.startswith("raise_")]
    applied = Counter(entry.rule for record in records for entry in record.applied)
    declined = [entry.sentence() for record in records for entry in record.declined]
    assert dict(applied) == EXPECTED[name]
    assert declined == []


@pytest.mark.parametrize(("name", "attention"), zoo.CASES)
def test_nothing_spelled_out_is_left(name: str, attention: zoo.Attention) -> None:
    """Counted apart from the rules: no root of a mean, no negated half, no lone activation."""
    raised = Pipeline(PASSES).run(captured(name, attention))
    names = Counter(
        str(getattr(n.target, "_schema", n.target)).split("(")[0] for n in raised.graph.nodes
    )
    tanh = {"gemma2": 3, "bert": 1, "vit": 1}.get(name, 0)  # soft caps; poolers
    left = {
        "aten::rsqrt": 0,
        "aten::cos": 1,
        "aten::sin": 1,
        "aten::tanh": tanh,
        "aten::erf": 0,
    }
    for operator, most in left.items():
        assert names[operator] <= most, operator
    assert names["aten::pow"] == 0 or name == "bloom"  # powers of two, for its slopes


@pytest.mark.parametrize(("name", "attention"), zoo.CASES)
def test_canonicalizing_twice_is_canonicalizing_once(name: str, attention: zoo.Attention) -> None:
    once, _ = run_pass(Canonicalize(), captured(name, attention))
    twice, journal = run_pass(Canonicalize(), once)
    assert journal.count == 0
    assert program_text(twice, weights=True) == program_text(once, weights=True)


@pytest.mark.parametrize(("name", "attention"), zoo.CASES)
def test_canonicalizing_keeps_every_bit(name: str, attention: zoo.Attention) -> None:
    program = captured(name, attention)
    after, _ = run_pass(Canonicalize(), program)
    for inputs in probes(name, attention, program):
        for old, new in zip(run(program, inputs), run(after, inputs), strict=True):
            if (name, attention) == ("whisper", "eager"):
                # its layout copies are gone, so a matrix product adds its terms in another order
                torch.testing.assert_close(
                    new, old, rtol=0, atol=64 * 2**-23 * float(old.abs().max())
                )
            else:
                assert torch.equal(old, new)
