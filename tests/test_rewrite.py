"""The pattern language and the driver: what matches, what is declined and in which words."""

from __future__ import annotations

from typing import Any

import build
import pytest
import torch
from planish.ir.edit import Editor, shape
from planish.ir.errors import PatternError
from planish.ir.interpret import run
from planish.ir.pattern import op
from planish.ir.program import Node, Program
from planish.ir.rewrite import Journal, Rewrite, apply_rules, rewrite

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
Y = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))


def gate() -> Rewrite:
    @rewrite
    def swiglu(gate: Node, up: Node):
        return op.silu(gate) * up

    @swiglu.to
    def fused(gate: Node, up: Node):
        return op.gated(gate, up, "silu")

    return swiglu


def applied(program: Program, *rules: Rewrite, **journal: Any) -> tuple[Program, Journal]:
    after = program.copy()
    notes = Journal(after, **journal)
    apply_rules(after, rules, notes)
    return after, notes


def reasons(program: Program, *rules: Rewrite) -> list[str]:
    return [d.sentence() for d in applied(program, *rules)[1].declined_records()]


def test_commutative_operations_match_in_both_orders() -> None:
    golden = "%x : f32[n0, 5]\n%y : f32[n0, 5]\n%gated = gated(%x, %y, 'silu') : f32[n0, 5]"
    for body in (lambda x, y: op.mul(op.silu(x), y), lambda x, y: op.mul(y, op.silu(x))):
        program = build.program(body, {"x": X, "y": Y})
        after, notes = applied(program, gate())
        assert str(after) == golden + "\nreturn [%gated]"
        assert notes.count == 1
        assert torch.equal(run(after, [X, Y])[0], run(program, [X, Y])[0])


def test_subtraction_matches_in_one_order_only() -> None:
    @rewrite
    def negated(x: Node, y: Node):
        return op.neg(x) - y

    negated.to(lambda x, y: op.neg(op.add(x, y)))
    matching = build.program(lambda x, y: op.sub(op.neg(x), y), XY())
    assert applied(matching, negated)[1].count == 1
    other = build.program(lambda x, y: op.sub(y, op.neg(x)), XY())
    assert applied(other, negated)[1].count == 0


def XY() -> dict[str, torch.Tensor]:
    return {"x": X, "y": Y}


def test_a_wildcard_used_twice_means_the_same_value() -> None:
    @rewrite
    def quick(x: Node):
        return x * op.sigmoid(x)

    quick.to(lambda x: op.silu(x))
    same = build.program(lambda x, y: op.mul(x, op.sigmoid(x)), XY())
    assert applied(same, quick)[1].count == 1
    other = build.program(lambda x, y: op.mul(x, op.sigmoid(y)), XY())
    assert applied(other, quick)[1].count == 0
    assert reasons(other, quick) == [
        "quick: the root module: %mul: x is placeholder (%x) in one place, "
        "placeholder (%y) in another"
    ]


def test_numbers_bind_where_annotated_and_constants_are_compared() -> None:
    @rewrite
    def scaled(x: Node, factor: float):
        return op.mul(x, factor) + 1

    bound: list[object] = []

    @scaled.to
    def build_it(x: Node, factor: float):
        bound.append(factor)
        return op.add(x, factor)

    def program(factor: Any, added: Any) -> Program:
        return build.program(
            lambda x, y: op.add(op.mul(x, y if factor is None else factor), added), XY()
        )

    assert applied(program(2.5, 1), scaled)[1].count == 1
    assert applied(program(3, 1.0), scaled)[1].count == 1  # 1 and 1.0 are the same number
    assert bound == [2.5, 3]
    assert applied(program(2.5, 2), scaled)[1].count == 0
    assert reasons(program(2.5, 2), scaled)[0].endswith("expected 1, found 2")
    assert reasons(program(None, 1), scaled)[0].endswith("factor cannot be placeholder (%y)")


def test_defaults_keywords_and_positions_are_one_spelling() -> None:
    @rewrite
    def mean_last(x: Node):
        return op.mean(x, [-1], keepdim=True) * 2

    mean_last.to(lambda x: op.sum(x, [-1], True))
    positional = build.program(lambda x: op.mul(op.mean(x, [-1], True), 2), {"x": X})
    keyword = build.program(lambda x: op.mul(op.mean(x, dim=[-1], keepdim=True), 2), {"x": X})
    default = build.program(lambda x: op.mul(op.mean(x, [-1]), 2), {"x": X})
    assert [applied(p, mean_last)[1].count for p in (positional, keyword, default)] == [1, 1, 0]
    assert reasons(default, mean_last)[0].endswith("expected True, found False")


def test_a_condition_declines_with_its_sentence() -> None:
    rule = gate()

    @rule.unless
    def shapes_differ(gate: Node, up: Node) -> str | None:
        a, b = shape(gate), shape(up)
        return None if a == b else f"gate has {a[-1]} channels but up has {b[-1]}"

    program = build.program(lambda x, y: op.mul(op.silu(x), y), {"x": X, "y": torch.randn(4, 1)})
    assert reasons(program, rule) == [
        "swiglu: the root module: %mul: gate has 5 channels but up has 1"
    ]


def test_other_operations_are_no_candidates_and_no_noise() -> None:
    program = build.program(lambda x, y: op.mul(op.relu(x), y), XY())
    after, notes = applied(program, gate())
    assert (notes.count, notes.declined_records()) == (0, [])
    assert str(after) == str(program)


def three_gates(x: Node, y: Node) -> Node:
    for place in range(3):
        with build.inside(f"layers.{place}"):
            x = op.mul(op.silu(x), y)
    return x


def test_rewrites_are_numbered_and_can_be_limited_and_skipped() -> None:
    program = build.program(three_gates, XY())
    for options, fused in (
        ({}, [0, 1, 2]),
        ({"limit": 0}, []),
        ({"limit": 2}, [0, 1]),
        ({"skip": [2]}, [0, 2]),
        ({"limit": 2, "skip": [1]}, [1]),
    ):
        after, notes = applied(program, gate(), **options)
        assert notes.count == 3
        modules = [n.meta["module"] for n in after.graph.nodes if "gated" in str(n.target)]
        assert modules == [f"layers.{place}" for place in fused], options
        assert [a.number for a in notes.applied_records(after)] == [place + 1 for place in fused]


def test_records_name_both_values_and_their_module() -> None:
    after, notes = applied(build.program(three_gates, XY()), gate())
    record = notes.applied_records(after)[1]
    assert (record.rule, record.module) == ("swiglu", "layers.1")
    assert (record.before, record.after) == ("layers.1.mul", "layers.1")


def test_chains_of_rewrites_pair_the_first_value_with_the_last() -> None:
    program = build.program(lambda x, y: op.mul(op.silu(x), y), XY()).copy()
    journal, editor = Journal(program), Editor(program)
    root = program.results[0]
    root_name = root.name
    for activation in ("silu", "silu"):
        assert journal.offers()
        with editor.at(root):
            new = op.gated(*program.inputs, activation)
        editor.replace(root, new)
        journal.replaced("again", root, new)
        root = new
    assert journal.final_pairs() == [(1, root_name, root.name)]


def test_a_circle_of_replacements_ends() -> None:
    program = build.program(lambda x, y: (op.relu(x), op.relu(y)), XY())
    journal = Journal(program)
    first, second = program.results
    for old, new in ((first, second), (second, first)):
        journal.offers()
        journal.replaced("swap", old, new)
    assert journal.final_pairs() == [
        (1, first.name, first.name),
        (2, second.name, second.name),
    ]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda: rewrite(lambda x: x), "is not an operation"),
        (lambda: op.no_such_operation, "no operation 'no_such_operation'"),
        (lambda: op.relu(X), "outside of a rewrite"),
    ],
)
def test_rules_written_wrongly_are_told(write: Any, message: str) -> None:
    with pytest.raises(PatternError, match=message):
        write()


def test_a_builder_that_asks_for_what_is_not_bound_is_told() -> None:
    rule = gate()
    rule.to(lambda gate, down: op.relu(gate))
    with pytest.raises(PatternError, match=r"asks for \['down'\]"):
        applied(build.program(three_gates, XY()), rule)


def test_a_rule_without_replacement_is_told() -> None:
    @rewrite
    def twice(x: Node):
        return op.relu(op.relu(x))

    with pytest.raises(PatternError, match="twice has no replacement"):
        applied(build.program(lambda x: op.relu(op.relu(x)), {"x": X}), twice)
