"""Structure checks name the fault; numbers are judged at the values that a pass touched."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import build
import pytest
import torch
from planish.ir.compare import count_nans, digest, relative_deviation
from planish.ir.edit import Editor
from planish.ir.errors import PassBroke
from planish.ir.pattern import op
from planish.ir.program import Node, Program
from planish.ir.value_store import ValueStore
from planish.ir.verify import WIDE_LIMIT, Deviation, Yardstick, check_structure
from torch import Tensor

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
W = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
NAN, INF = math.nan, math.inf


def mlp() -> Program:
    def body(x: Node, w: Node) -> Node:
        with build.inside("mlp.up"):
            y = op.linear(x, w)
        with build.inside("mlp"):
            return op.silu(y)

    return build.program(body, {"x": X}, {"up.weight": W})


def node(program: Program, name: str) -> Node:
    return next(n for n in program.graph.nodes if name in str(n.target))


def test_a_right_program_passes() -> None:
    program = mlp()
    check_structure(program)
    check_structure(program.copy(), program, "nothing")


def reorder(program: Program) -> None:
    node(program, "linear").append(node(program, "up.weight"))
    node(program, "silu").append(node(program, "linear"))


def lose_weight(program: Program) -> None:
    del program.weights["up.weight"]


def reshape_weight(program: Program) -> None:
    program.weights["up.weight"] = torch.randn(9, 5)


def misfit(program: Program) -> None:
    editor = Editor(program)
    other = editor.weight("other", torch.randn(9, 5))
    node(program, "linear").update_arg(1, other)


def lie(program: Program) -> None:
    node(program, "silu").target = torch.ops.aten.argsort.default


def other_output(program: Program) -> None:
    program.output.args = ([node(program, "up.weight")],)


def fewer_outputs(program: Program) -> None:
    program.output.args = ([],)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (reorder, r"reads %.*, which is computed later or gone"),
        (lose_weight, r"reads the weight up\.weight, which does not exist"),
        (reshape_weight, r"does not have the shape or dtype of the weight up\.weight"),
        (misfit, r"%mlp\.up cannot be computed"),
        (lie, r"%mlp does not compute what it claims"),
        (other_output, r"returns %up_weight in the place of %silu\w*, of another type"),
        (fewer_outputs, "has other outputs"),
    ],
)
def test_malformed_programs_are_told(damage: Callable[[Program], None], message: str) -> None:
    before = mlp()
    after = before.copy()
    damage(after)
    with pytest.raises(PassBroke, match=message) as raised:
        check_structure(after, before, "smooth")
    assert str(raised.value).startswith("smooth left the program wrong: %")
    assert "\n >  " in str(raised.value)


def test_a_changed_type_upstream_is_not_trusted() -> None:
    """A node whose own arguments are the same is checked again if what it reads changed type."""
    before = mlp()
    after = before.copy()
    editor = Editor(after)
    linear = node(after, "linear")
    linear.update_arg(1, editor.weight("wide", torch.randn(11, 6)))
    linear.meta["val"] = torch.empty(4, 11)
    with pytest.raises(PassBroke, match="does not compute what it claims"):
        check_structure(after, before, "widen")


def changed(make: Callable[[Node], Node], name: str = "silu") -> tuple[Program, Program, list[Any]]:
    """A program, the same with one value replaced, and the touched pair."""
    before = mlp()
    after = before.copy()
    editor = Editor(after)
    old = node(after, name)
    with editor.at(old):
        new = make(old.args[0])  # type: ignore[arg-type]
    editor.replace(old, new)
    return before, after, [(1, old.name, new.name)]


def deviations(
    before: Program,
    after: Program,
    pairs: list[Any],
    *,
    exact: bool,
    probes: Any = None,
    **more: Any,
) -> list[Deviation]:
    return Yardstick(before, probes or [[X]], exact).compare(after, pairs, 8.0, **more)


def test_the_same_function_spelled_otherwise_is_within_bounds() -> None:
    before, after, pairs = changed(lambda y: op.mul(y, op.sigmoid(y)))
    after.graph.eliminate_dead_code()
    touched = next(d for d in deviations(before, after, pairs, exact=False) if d.number == 1)
    assert not touched.broken
    assert 0 < touched.incoming < 1e-6
    assert touched.outgoing <= touched.limit
    assert touched.wide < 1e-14


def test_another_function_is_broken_however_close() -> None:
    before, after, pairs = changed(lambda y: op.mul(op.silu(y), 1 + 3e-7))
    found = deviations(before, after, pairs, exact=False)
    assert [d.number for d in found] == [1, 0]
    assert all(d.broken for d in found)
    assert found[0].wide == pytest.approx(3e-7, rel=1e-3)
    assert found[0].module == "mlp"


def test_constants_rounded_again_are_allowed() -> None:
    before, after, pairs = changed(lambda y: op.mul(op.silu(y), 1 + WIDE_LIMIT / 2))
    assert not any(d.broken for d in deviations(before, after, pairs, exact=False))


def test_exact_means_the_same_bits() -> None:
    before, after, pairs = changed(op.silu)
    assert not any(d.broken for d in deviations(before, after, pairs, exact=True))
    before, after, pairs = changed(lambda y: op.mul(op.silu(y), 1 + 1.2e-7))
    found = deviations(before, after, pairs, exact=True)
    assert all(d.broken and 0 < d.outgoing < 2e-7 for d in found)


def test_precision_that_is_lost_on_the_way_is_broken() -> None:
    """In float64 nothing is wrong: only the native run shows it."""

    def through_half(y: Node) -> Node:
        narrow = op._to_copy(op.silu(y), dtype=torch.float16)
        return op._to_copy(narrow, dtype=torch.float32)

    before, after, pairs = changed(through_half)
    found = deviations(before, after, pairs, exact=False)
    assert all(d.broken and d.wide < 1e-14 and d.outgoing > 1e-5 for d in found)


def test_integer_values_must_be_equal() -> None:
    def body(x: Node) -> Any:
        return op.argmax(x, -1), op.gt(x, 0.0)

    before = build.program(body, {"x": X})
    for build_other, broken in (
        (lambda n: op.argmax(n, -1), False),
        (lambda n: op.argmin(n, -1), True),
    ):
        after = before.copy()
        old = after.results[0]
        editor = Editor(after)
        with editor.at(old):
            new = build_other(after.inputs[0])
        editor.replace(old, new)
        found = deviations(before, after, [(1, old.name, new.name)], exact=False)
        assert [d.broken for d in found if d.number == 1] == [broken]
        assert found[0].limit == 0
        assert sum(d.broken for d in found) == 2 * broken


def test_every_output_is_compared_even_inputs_and_weights() -> None:
    before = build.program(lambda x, y, w: (x, w, op.relu(x)), {"x": X, "y": X + 1}, {"w": W})
    after = before.copy()
    assert not any(d.broken for d in deviations(before, after, [], exact=True, probes=[[X, X + 1]]))
    x, y = after.inputs
    _, w, out = after.results
    after.output.args = ([y, w, out],)
    found = deviations(before, after, [], exact=True, probes=[[X, X + 1]])
    assert [d.after for d in found if d.broken] == ["y"]
    assert deviations(before, after, [], exact=True, probes=[[X, X]])[0].broken is False
    after.output.args = ([x, w, out],)
    after.weights["w"] = W + 1e-3
    found = deviations(before, after, [], exact=False, probes=[[X, X + 1]])
    assert [d.after for d in found if d.broken] == ["w"]


def test_the_worst_probe_is_told() -> None:
    before, after, pairs = changed(lambda y: op.relu(y))
    zero = torch.zeros(4, 6)
    found = deviations(before, after, pairs, exact=True, probes=[[zero], [X], [zero]])
    assert {d.probe for d in found} == {1}


def test_new_nans_are_broken_where_the_bound_says_nothing() -> None:
    """The incoming program overflows in float32 and not in float64, so its error is infinite."""

    def body(x: Node) -> Node:
        return op.mul(op.mul(x, 1e30), 1e30)

    before = build.program(body, {"x": X})
    after = before.copy()
    old = after.results[0]
    with Editor(after).at(after.output):
        new = op.sub(old, op.mul(old, 0.5))
    after.output.args = ([new],)
    found = deviations(before, after, [], exact=False, drift=False)
    assert found[0].limit == INF
    assert found[0].nans == X.numel()
    assert found[0].broken


def test_a_program_that_does_not_run_is_told() -> None:
    before = mlp()
    after = before.copy()
    node(after, "silu").args = ("text",)
    with pytest.raises(PassBroke, match="does not run on a probe"):
        deviations(before, after, [], exact=True)


def test_pairs_whose_values_are_gone_are_left_out() -> None:
    before = mlp()
    found = deviations(before, before.copy(), [(1, "gone", "silu"), (2, "linear", "x")], exact=True)
    assert [d.number for d in found] == [0]


@pytest.mark.parametrize(
    ("reference", "value", "error"),
    [
        ([3.0, 4.0], [3.0, 4.5], 0.1),
        ([0.0, 0.0], [0.0, 0.25], 0.25),
        ([1.0, NAN], [1.0, NAN], 0.0),
        ([1.0, NAN], [1.0, 7.0], INF),
        ([1.0, 7.0], [1.0, NAN], INF),
        ([1.0, INF], [1.0, INF], 0.0),
        ([1.0, INF], [1.0, -INF], INF),
        ([1.0, -INF], [1.0, NAN], INF),
        ([4.0, INF, NAN], [5.0, INF, NAN], 0.25),
        ([], [], 0.0),
    ],
)
def test_relative_deviation(reference: list[float], value: list[float], error: float) -> None:
    assert relative_deviation(torch.tensor(reference), torch.tensor(value)) == pytest.approx(error)


def test_relative_deviation_of_other_kinds() -> None:
    a = torch.tensor([[1.0, 2.0, 3.0]])
    assert relative_deviation(a, a[0]) == 0.0  # an axis of size one more or less
    assert relative_deviation(a, a.T) == INF or a.squeeze().shape == a.T.squeeze().shape
    assert relative_deviation(a, a[:, :2]) == INF
    assert relative_deviation(torch.tensor([1, 2]), torch.tensor([1, 3])) == INF
    assert relative_deviation((a, 1), (a, 1)) == 0.0
    assert relative_deviation((a, 1), (a, 2)) == INF
    assert relative_deviation((a, a), (a, a + 1)) == INF
    assert relative_deviation(3, 3.0) == 0.0
    assert relative_deviation(a, None) == INF
    big = torch.linspace(1, 2, 5_000_011)  # several blocks
    assert relative_deviation(big, big * (1 + 2**-10)) == pytest.approx(2**-10, rel=1e-4)


def test_digests_are_of_bits_but_for_the_sign_of_zero_and_the_kind_of_nan() -> None:
    def same(a: Tensor, b: Tensor) -> bool:
        return digest(a) == digest(b)

    x = torch.tensor([[1.0, 0.0, NAN], [2.0, INF, -3.0]])
    assert same(x, x.clone())
    assert same(x, torch.where(x == 0, -0.0, x))
    assert same(x, x.t().contiguous().t())
    assert same(torch.tensor(2.0), torch.tensor(2.0))
    assert not same(x, x.t())
    assert not same(x, x.reshape(3, 2))
    assert not same(x, x.double())
    assert not same(torch.tensor([1.0]), torch.tensor([1.0]).nextafter(torch.tensor(2.0)))
    assert not same(torch.tensor([True]), torch.tensor([False]))
    assert digest(3) != digest(4)
    assert count_nans(x) == 1
    assert count_nans(torch.tensor([1])) == 0


def test_values_past_the_budget_lie_in_a_file_and_are_the_same() -> None:
    store = ValueStore(memory=1000)
    store["small"] = torch.ones(50)
    first, second = torch.randn(11, 20), torch.randn(30, 20).double()
    store["first"], store["second"] = first, second
    folder = Path(store._folder.name)  # type: ignore[union-attr]
    assert sorted(path.stat().st_size for path in folder.iterdir()) == [first.nbytes, second.nbytes]
    assert torch.equal(store["first"], first)
    assert torch.equal(store["second"], second)
    store["flag"] = True
    assert store["flag"] is True
    store["second"].add_(1)  # the file is the value
    assert torch.equal(store["second"], second + 1)
    del store
    assert not folder.exists()


def test_a_small_budget_gives_the_same_verdict() -> None:
    before, after, pairs = changed(lambda y: op.mul(op.silu(y), 1 + 3e-7))
    roomy = Yardstick(before, [[X]], False).compare(after, pairs, 8.0)
    tight = Yardstick(before, [[X]], False, memory=0).compare(after, pairs, 8.0)
    assert roomy == tight
