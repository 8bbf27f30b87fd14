"""A fault planted among right passes is named, down to its one rewrite, and replayed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import build
import planted
import pytest
import torch
import zoo
from planish.ir.capture import capture_module
from planish.ir.edit import Editor
from planish.ir.errors import CorruptFile, OutputExists, PassBroke, PlanishError, SourceNotFound
from planish.ir.formats import parse_format
from planish.ir.pattern import op
from planish.ir.program import Program
from planish.passes.bisect import bisect
from planish.passes.contract import Context, Pass, contract
from planish.passes.culprit import Culprit
from planish.passes.drop_dead import DropDead
from planish.passes.pipeline import Pipeline
from planish.passes.reproducer import replay
from saved_programs import saved_language_model

LAYER = "model.layers.2.post_attention_layernorm"


@pytest.fixture(scope="module")
def decoder() -> tuple[Program, list[torch.Tensor]]:
    sample = zoo.build("llama", "sdpa", layers=4)
    program = capture_module(sample.model, sample.args, sample.kwargs)
    return program, program.flatten_inputs((), sample.other_inputs())


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check_planted(culprit: Culprit | None, layer: str, rewrites: int, number: int) -> None:
    assert culprit is not None
    assert (culprit.place, culprit.of, culprit.step) == (14, 21, "fuse_norms")
    assert (culprit.rule, culprit.number, culprit.rewrites) == ("rms_norm", number, rewrites)
    assert culprit.module == layer
    assert (culprit.before, culprit.after) == (f"{layer}.mul_1", layer)
    assert culprit.source.startswith('File "modeling_llama.py", line ')
    assert culprit.wide > 1e-7
    assert "pow.Tensor_Scalar" in culprit.text_before
    assert culprit.text_after.count("rms_norm") == 1


def test_a_fault_planted_in_a_real_model_is_named(smollm2_folder: Path, tmp_path: Path) -> None:
    """One of 61 norms of a 30-layer model gets ten times the epsilon: an error of 7e-7."""
    program = saved_language_model(smollm2_folder)
    layer = "model.layers.17.post_attention_layernorm"
    passes = planted.among_right_passes(planted.FuseNorms(layer))
    probe = [torch.tensor([[1, 504, 3575, 282, 4649, 314, 3291, 13]])]
    culprit = bisect(program, passes, [probe], tmp_path / "broken")
    check_planted(culprit, layer, rewrites=61, number=36)
    assert culprit is not None
    assert culprit.tensor == "f32[1, 8, 576]"
    assert folder_bytes(tmp_path / "broken") < 100_000
    assert replay(tmp_path / "broken") == culprit


def test_a_planted_fault_is_named_and_replayed(
    decoder: tuple[Program, list[torch.Tensor]], tmp_path: Path
) -> None:
    program, probe = decoder
    passes = planted.among_right_passes(planted.FuseNorms(LAYER))
    culprit = bisect(program, passes, [probe], tmp_path / "broken")
    check_planted(culprit, LAYER, rewrites=9, number=6)
    again = replay(tmp_path / "broken")
    assert again == culprit
    text = str(again)
    assert "pass 14 of 21" in text
    assert "rewrite 6 of 9 (rms_norm)" in text
    assert f"reproduce: planish explain {tmp_path / 'broken'}" in text


def test_right_passes_are_not_accused(decoder: tuple[Program, list[torch.Tensor]]) -> None:
    program, probe = decoder
    passes = planted.twenty_right_passes()
    assert len(passes) == 20
    assert bisect(program, passes, [probe]) is None


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
W = torch.randn(10, 6, generator=torch.Generator().manual_seed(4))
V = torch.randn(7, 10, generator=torch.Generator().manual_seed(5))


def small() -> Program:
    def body(x, w, v):
        with build.inside("up"):
            x = op.linear(x, w)
        with build.inside("act"):
            x = op.silu(x)
        with build.inside("down"):
            return op.linear(x, v)

    return build.program(body, {"x": X}, {"up.weight": W, "down.weight": V})


@dataclass(frozen=True)
class Unnamed(Pass):
    """Swaps silu for gelu and tells the journal nothing."""

    contract = contract("bounded")

    def run(self, program: Program, context: Context) -> None:
        for node in program.graph.nodes:
            if node.target is torch.ops.aten.silu.default:
                node.target = torch.ops.aten.gelu.default


@dataclass(frozen=True)
class Malformed(Pass):
    """Reads the output's linear from a weight that does not fit, as its second rewrite."""

    contract = contract("bounded")

    def run(self, program: Program, context: Context) -> None:
        first, last = (n for n in program.graph.nodes if "linear" in str(n.target))
        if context.journal.offers():
            context.journal.noted("first", first)
        if context.journal.offers():
            last.args = (last.args[0], first.args[1])
            context.journal.replaced("second", last, last)


@dataclass(frozen=True)
class Coarse(Pass):
    """Rounds every weight to few bits, one of them to too few."""

    contract = contract("lossy", min_sqnr=20.0)

    def run(self, program: Program, context: Context) -> None:
        for name, format_name in (("up.weight", "int6"), ("down.weight", "int2")):
            if context.journal.offers():
                encoded = parse_format(f"{format_name}-channel-sym")
                program.weights[name] = encoded.encode(program.weights[name])
                context.journal.changed_weight("round", name)


@dataclass(frozen=True)
class ScalesWeight(Pass):
    """A bounded pass whose second rewrite changes a weight and forgets the other side."""

    contract = contract("bounded")

    def run(self, program: Program, context: Context) -> None:
        root = program.results[0]
        for number in (1, 2):
            if context.journal.offers():
                editor = Editor(program)
                name = f"down.scaled_{number}"
                with editor.at(root):
                    factor = 1.0 if number == 1 else 1.001
                    weight = editor.weight(name, program.weights["down.weight"] * factor)
                    new = op.linear(root.args[0], weight)
                editor.replace(root, new)
                context.journal.replaced("scale", root, new)
                root = new


def test_a_pass_that_is_wrong_apart_from_its_rewrites(tmp_path: Path) -> None:
    culprit = bisect(small(), [DropDead(), Unnamed(), DropDead()], [[X]], tmp_path / "b")
    assert culprit is not None
    assert (culprit.step, culprit.place, culprit.number) == ("unnamed", 2, 0)
    assert "in an edit that none of its 0 rewrites names" in str(culprit)
    assert culprit.text_after.splitlines()[0].startswith("%act = gelu")
    assert replay(tmp_path / "b") == culprit


def test_a_malformed_program_is_traced_to_its_rewrite(tmp_path: Path) -> None:
    culprit = bisect(small(), [DropDead(), Malformed()], [[X]], tmp_path / "b")
    assert culprit is not None
    assert (culprit.kind, culprit.number, culprit.rule) == ("malformed", 2, "second")
    assert "cannot be computed" in culprit.message
    assert replay(tmp_path / "b") == culprit


def test_a_lossy_pass_is_held_to_its_budget(tmp_path: Path) -> None:
    culprit = bisect(small(), [DropDead(), Coarse(), DropDead()], [[X]], tmp_path / "b")
    assert culprit is not None
    assert (culprit.kind, culprit.number, culprit.after) == ("weight", 2, "down.weight")
    assert culprit.error_after < 20 == culprit.allowed
    assert replay(tmp_path / "b") == culprit
    assert not list((tmp_path / "b").glob("**/*up*"))


def test_a_fault_after_a_lossy_pass_is_found() -> None:
    @dataclass(frozen=True)
    class Gentle(Coarse):
        contract = contract("lossy", min_sqnr=2.0)

    culprit = bisect(small(), [DropDead(), Gentle(), DropDead(), Unnamed(), DropDead()], [[X]])
    assert culprit is not None
    assert (culprit.step, culprit.place) == ("unnamed", 4)


def test_a_rewrite_of_weight_and_node_in_a_chain(tmp_path: Path) -> None:
    culprit = bisect(small(), [ScalesWeight()], [[X]], tmp_path / "b")
    assert culprit is not None
    assert (culprit.number, culprit.rewrites) == (2, 2)
    assert culprit.wide == pytest.approx(1e-3, rel=1e-3)
    assert replay(tmp_path / "b") == culprit


def test_the_pipeline_writes_and_names_the_reproducer(
    decoder: tuple[Program, list[torch.Tensor]], tmp_path: Path
) -> None:
    program, probe = decoder
    pipeline = Pipeline(
        [DropDead(), planted.FuseNorms(LAYER)],
        verify="numbers",
        on_break="raise",
        reproducer=tmp_path / "broken",
    )
    with pytest.raises(PassBroke) as raised:
        pipeline.run(program, [probe])
    assert f"reproduce: planish explain {tmp_path / 'broken'}" in str(raised.value)
    assert raised.value.where == LAYER
    assert replay(tmp_path / "broken").number == 6


def test_bad_fault_folders_are_told(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match=r"holds no fault\.json"):
        replay(tmp_path)
    for text in ("{", '{"culprit": {"kind": "numbers"}}', '{"culprit": 3}', "[]"):
        (tmp_path / "fault.json").write_text(text)
        with pytest.raises(CorruptFile, match=r"fault\.json is damaged"):
            replay(tmp_path)
    bisect(small(), [Unnamed()], [[X]], tmp_path / "b")
    with pytest.raises(OutputExists):
        bisect(small(), [Unnamed()], [[X]], tmp_path / "b")
    form = json.loads((tmp_path / "b" / "fault.json").read_text())
    form["growth"] = "many"
    (tmp_path / "b" / "fault.json").write_text(json.dumps(form))
    with pytest.raises(PlanishError, match="damaged"):
        replay(tmp_path / "b")
