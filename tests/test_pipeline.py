"""The pipeline: orders refused, contracts held, single rewrites rolled back, a true history."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import build
import planted
import pytest
import torch
from planish.ir.edit import Editor
from planish.ir.errors import FactBroken, PassBroke, WrongOption, WrongOrder
from planish.ir.formats import parse_format
from planish.ir.history import PassRecord
from planish.ir.interpret import run
from planish.ir.pattern import op
from planish.ir.program import Node, Program
from planish.passes.bisect import bisect
from planish.passes.contract import Context, Pass, contract
from planish.passes.drop_dead import DropDead
from planish.passes.pipeline import Pipeline
from planish.passes.share_subexpressions import ShareSubexpressions

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
W = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
V = torch.randn(6, 9, generator=torch.Generator().manual_seed(2))


def layers(count: int = 5) -> Program:
    """x = silu(x) in module "0", "1", ..., each on the one before, after a linear up and down."""

    def body(x: Node, w: Node, v: Node) -> Node:
        x = op.linear(op.linear(x, w), v)
        for place in range(count):
            with build.inside(str(place)):
                x = op.silu(x)
        return x

    return build.program(body, {"x": X}, {"up": W, "down": V})


@dataclass(frozen=True)
class Respell(Pass):
    """silu(x) as x * sigmoid(x), numbered from 1; the numbers in `wrong` use tanh."""

    contract = contract("bounded")
    wrong: tuple[int, ...] = ()
    breed: bool = False
    """Whether leaving out a rewrite makes the pass do two others afterwards."""

    def run(self, program: Program, context: Context) -> None:
        editor, journal = Editor(program), context.journal
        for place, node in enumerate(list(program.graph.nodes)):
            if "silu" not in str(node.target):
                continue
            offered = journal.offers()
            if offered:
                with editor.at(node):
                    gate = op.tanh if int(node.meta["module"]) + 1 in self.wrong else op.sigmoid
                    new = op.mul(node.args[0], gate(node.args[0]))
                editor.replace(node, new)
                journal.replaced("respell", node, new, f"place {place}")
            elif self.breed:
                for _ in range(2):
                    if journal.offers():
                        journal.noted("mourn", node)
        editor.sweep()


def test_wrong_orders_are_refused_before_anything_runs() -> None:
    ran: list[str] = []

    class Quantize(Pass):
        contract = contract("lossy", breaks=["dense_weights"])

        def run(self, program: Program, context: Context) -> None:
            ran.append("quantize")

    class Merge(Pass):
        contract = contract("bounded", requires=["dense_weights"], ensures=["merged"])

        def run(self, program: Program, context: Context) -> None:
            ran.append("merge")

    class Use(Quantize):
        contract = contract("bounded", requires=["merged"])

    class Calibrated(Quantize):
        contract = contract("bounded", needs=["calibration"])

    for passes, message in (
        ([Quantize(), Merge()], "run merge before quantize, which breaks 'dense_weights'"),
        ([Use(), Merge()], "run merge, which ensures 'merged', before use"),
        ([DropDead(), Use()], "no pass of this recipe ensures 'merged'"),
        ([Calibrated()], "pass calibration="),
    ):
        with pytest.raises(WrongOrder, match=message):
            Pipeline(passes).run(layers())
    assert ran == []
    Pipeline([Merge(), Use(), Quantize()]).check_order(layers().facts)


def test_unknown_levels_are_told() -> None:
    with pytest.raises(WrongOption, match="structure or facts or numbers"):
        Pipeline([], verify="everything")
    with pytest.raises(WrongOption, match="rollback or raise"):
        Pipeline([], on_break="ignore")
    program = layers()
    program.examples = ()
    with pytest.raises(WrongOption, match="needs example inputs"):
        Pipeline([], verify="numbers").run(program)


def test_the_input_program_is_left_alone_and_progress_is_told() -> None:
    program = layers()
    text, steps = str(program), list[tuple[int, int, str]]()

    def progress(done: int, total: int, what: str) -> None:
        steps.append((done, total, what))

    after = Pipeline([Respell(), DropDead()], verify="numbers", progress=progress).run(program)
    assert str(program) == text
    assert len(program.history) == 0
    assert str(after) != text
    assert steps == [(0, 2, "respell"), (1, 2, "drop_dead"), (2, 2, "done")]


def test_a_right_pass_is_kept_whole_and_measured() -> None:
    after = Pipeline([Respell()], verify="numbers").run(layers())
    (record,) = after.history.records
    assert [a.number for a in record.applied] == [1, 2, 3, 4, 5]
    assert (record.rolled_back, record.declined) == ([], [])
    error, drift = record.measured
    assert 0 < error.after <= error.allowed
    assert drift.after < 1e-13
    assert record.nodes == (11, 16)
    assert "5 rewrites, 11 -> 16 nodes" in record.line()


def tanhs(program: Program) -> int:
    return sum("tanh" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("breed", [False, True])
@pytest.mark.parametrize("wrong", [(1,), (3,), (5,), (2, 4), (4, 5), (1, 2, 3, 4, 5)])
def test_single_wrong_rewrites_are_rolled_back(wrong: tuple[int, ...], breed: bool) -> None:
    """Also where leaving one out renumbers all later ones (`breed`)."""
    program = layers()
    after = Pipeline([Respell(wrong, breed)], verify="numbers").run(program)
    assert tanhs(after) == 0
    (record,) = after.history.records
    assert [a.module for a in record.rolled_back] == [str(n - 1) for n in wrong]
    assert all(a.rule == "respell" and a.before == a.module for a in record.rolled_back)
    applied = [a.module for a in record.applied if a.rule == "respell"]
    assert applied == [str(n) for n in range(5) if n + 1 not in wrong]
    sentences = [d.sentence() for d in record.declined]
    assert len(sentences) == len(wrong)
    for number, sentence in zip(wrong, sentences, strict=True):
        begin = f"respell: {number - 1}: %{number - 1}: rolled back: float64 runs differ by"
        assert sentence.startswith(begin)
    expected = run(program, [X], float64=True)[0]
    assert torch.allclose(run(after, [X], float64=True)[0], expected, rtol=1e-12, atol=0)


def test_raise_names_the_first_wrong_rewrite() -> None:
    pipeline = Pipeline([DropDead(), Respell((3, 4))], verify="numbers", on_break="raise")
    with pytest.raises(PassBroke) as raised:
        pipeline.run(layers())
    text = str(raised.value)
    assert "pass 2 of 2, respell" in text
    assert "in rewrite 3 of 5 (respell)" in text
    assert raised.value.where == "2"
    assert "%2.tanh = tanh(" in text


def test_without_numbers_a_wrong_pass_goes_through() -> None:
    assert tanhs(Pipeline([Respell((3,))], verify="facts").run(layers())) == 1


@dataclass(frozen=True)
class Broken(Pass):
    """Makes the second layer read a weight's rows: a program that cannot be computed."""

    contract = contract("exact")

    def run(self, program: Program, context: Context) -> None:
        for node in program.graph.nodes:
            if "linear" in str(node.target) and context.journal.offers():
                context.journal.replaced("cross", node, node)
                if node.args[1].target == "down":
                    node.update_arg(1, next(n for n in program.graph.nodes if n.target == "up"))


def test_a_malformed_rewrite_is_rolled_back_where_numbers_are_verified() -> None:
    after = Pipeline([Broken()], verify="numbers").run(layers())
    assert str(after) == str(layers())
    (record,) = after.history.records
    assert [a.before for a in record.rolled_back] == ["linear_1"]
    assert "rolled back: broken left the program wrong" in record.declined[0].reason
    with pytest.raises(PassBroke, match="broken left the program wrong"):
        Pipeline([Broken()], verify="structure").run(layers())


@dataclass(frozen=True)
class Unnamed(Pass):
    contract = contract("exact")

    def run(self, program: Program, context: Context) -> None:
        for node in program.graph.nodes:
            if "silu" in str(node.target):
                node.target = torch.ops.aten.tanh.default


def test_a_pass_wrong_without_any_rewrite_stops_the_pipeline() -> None:
    with pytest.raises(PassBroke, match="in an edit that none of its 0 rewrites names"):
        Pipeline([Unnamed()], verify="numbers").run(layers())


@dataclass(frozen=True)
class Round(Pass):
    """int8 for all weights but the last, which gets `bits`."""

    contract = contract("lossy", min_sqnr=20.0)
    bits: int = 8
    stray: bool = False
    blow: float = 1.0

    def run(self, program: Program, context: Context) -> None:
        for name in list(program.weights):
            if context.journal.offers():
                bits = self.bits if name == "down" else 8
                made = parse_format(f"int{bits}-channel-sym").encode(program.weights[name])
                program.weights[name] = made
                context.journal.changed_weight("round", name)
        if self.stray:
            node = next(n for n in program.graph.nodes if "silu" in str(n.target))
            node.target = torch.ops.aten.tanh.default


def weights_of(program: Program) -> dict[str, type]:
    return {name: type(program.weights.entry(name)).__name__ for name in program.weights}


def test_a_weight_below_its_budget_keeps_its_value() -> None:
    after = Pipeline([Round(bits=2)], verify="numbers").run(layers())
    assert weights_of(after) == {"up": "Encoded", "down": "Tensor"}
    (record,) = after.history.records
    assert [a.after for a in record.rolled_back] == ["down"]
    assert record.declined[0].reason.endswith("budget 20.0 dB")
    assert record.measured[0].measure == "least weight SQNR (dB)"
    assert record.measured[0].after >= 20.0
    outputs = record.measured[1]
    assert (outputs.measure, outputs.allowed) == ("relative change of the outputs", math.inf)
    assert 0 < outputs.after < 0.1


def test_a_lossy_pass_may_not_change_the_graph_unsaid() -> None:
    assert weights_of(Pipeline([Round()], verify="numbers").run(layers())) == {
        "up": "Encoded",
        "down": "Encoded",
    }
    with pytest.raises(PassBroke, match="round"):
        Pipeline([Round(stray=True)], verify="numbers").run(layers())


def test_an_ensured_fact_that_does_not_hold_is_told() -> None:
    class Lazy(Pass):
        contract = contract("exact", ensures=["no_dead_values"])

        def run(self, program: Program, context: Context) -> None:
            del program, context

    def body(x: Node) -> Node:
        op.tanh(x)
        return op.relu(x)

    program = build.program(body, {"x": X})
    with pytest.raises(FactBroken, match="lazy ensures a fact") as raised:
        Pipeline([Lazy()]).run(program)
    assert "%tanh is read by nobody" in raised.value.found
    assert "no_dead_values" in Pipeline([Lazy()], verify="structure").run(program).facts
    assert "no_dead_values" in Pipeline([DropDead()]).run(program).facts


def test_calibration_reaches_the_pass_in_every_attempt() -> None:
    seen: list[int] = []

    @dataclass(frozen=True)
    class Calibrated(Respell):
        contract = contract("bounded", needs=["calibration"])

        def run(self, program: Program, context: Context) -> None:
            seen.append(len(context.calibration))
            super().run(program, context)

    Pipeline([Calibrated((3,))], verify="numbers").run(layers(), calibration=[[X], [X]])
    assert len(seen) > 2
    assert set(seen) == {2}


def test_several_outputs_and_probes() -> None:
    def body(x: Node, w: Node) -> Any:
        with build.inside("0"):
            a = op.silu(x)
        with build.inside("1"):
            return a, op.silu(op.linear(x, w)), x

    program = build.program(body, {"x": X}, {"w": W})
    probes = [[X], [torch.randn(2, 6)]]
    after = Pipeline([Respell((1,))], verify="numbers").run(program, probes)
    assert [a.module for a in after.history.records[0].rolled_back] == ["0"]
    assert tanhs(after) == 0


def test_the_sample_passes_promise_what_they_do() -> None:
    def body(x: Node) -> Node:
        op.tanh(x)
        return op.add(op.relu(x), op.relu(x))

    program = build.program(body, {"x": X})
    after = Pipeline([ShareSubexpressions(), DropDead()], verify="numbers").run(program)
    names = [record.name for record in after.history]
    assert names == ["share_subexpressions", "drop_dead"]
    assert [len(r.applied) for r in after.history] == [1, 1]
    assert all(isinstance(r, PassRecord) and r.measured[0].after == 0 for r in after.history)


def test_growth_holds_rounding_and_not_only_meaning() -> None:
    """A detour through bfloat16 is the same function in float64 and still breaks its bound."""

    @dataclass(frozen=True)
    class Detour(planted.Nothing):
        contract = contract("bounded")

        def run(self, program: Program, context: Context) -> None:
            node = next(n for n in program.graph.nodes if "silu" in str(n.target))
            editor = Editor(program)
            if context.journal.offers():
                with editor.at(node):
                    narrow = op._to_copy(node.args[0], dtype=torch.bfloat16)
                    new = op._to_copy(op.silu(narrow), dtype=torch.float32)
                editor.replace(node, new)
                context.journal.replaced("detour", node, new)
                editor.sweep()

    after = Pipeline([Detour()], verify="numbers").run(layers())
    assert str(after) == str(layers())
    reason = after.history.records[0].declined[0].reason
    assert reason.startswith("rolled back: error")
    assert "against float64, allowed" in reason


def test_after_other_inputs_numbers_are_said_to_be_unverified() -> None:
    @dataclass(frozen=True)
    class AddInput(planted.Nothing):
        contract = contract("exact", changes_interface=True)

        def run(self, program: Program, context: Context) -> None:
            first = program.inputs[0]
            with program.graph.inserting_after(first):
                new = program.graph.placeholder("offset")
            new.meta.update(first.meta)

    passes = [AddInput(), Respell((2,))]
    after = Pipeline(passes, verify="numbers").run(layers())
    (sentence,) = [d.sentence() for d in after.history.records[1].declined]
    assert "numbers not verified: other inputs than the probes" in sentence
    assert bisect(layers(), passes, [[X]]) is None
    culprit = bisect(layers(), [Respell((2,)), *passes], [[X]])
    assert culprit is not None and (culprit.place, culprit.number) == (1, 2)
