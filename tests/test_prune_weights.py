"""Zeros in weights: patterns hold, better methods err less, what stays is a least square."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from captured import captured
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.ir.capture import capture_module
from planish.ir.errors import NonFiniteWeight, UnknownOption, WrongOption, WrongOrder
from planish.ir.hessian import Hessian, damped, output_error
from planish.ir.interpret import run
from planish.ir.numerics import sqnr
from planish.ir.program import Program
from planish.ir.sparsity_patterns import Sparsity, parse_sparsity
from planish.ir.text import program_text
from planish.ir.weight_roles import weight_roles
from planish.passes.masked_least_squares import masked_least_squares, solved_exactly
from planish.passes.obs_columns import obs_mask
from planish.passes.pipeline import Pipeline
from planish.passes.prune_magnitude import PruneMagnitude
from planish.passes.prune_obc import PruneObc
from planish.passes.prune_plan import CannotPrune, PruningSavesNothing, WeightPruner
from planish.passes.prune_sparsegpt import PruneSparsegpt
from planish.passes.prune_wanda import PruneWanda
from planish.passes.quantize_weights import QuantizeWeights
from planish.passes.sparsegpt_columns import sparsegpt
from planish.recipes import pipeline, read_recipe
from tiny_stack import Stack
from torch import Tensor, nn

ROWS, WIDTH = 7, 40
METHODS: list[type[WeightPruner]] = [PruneMagnitude, PruneWanda, PruneSparsegpt, PruneObc]
PATTERNS = ["50%", "30%", "2:4", "4:8", "1:4", "3:7"]


def random_problem(seed: int, width: int = WIDTH, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """A weight [7, width] and the second moments [width, width] of correlated inputs."""
    made = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=made)
    sizes = torch.rand(width, generator=made) * 3 + 0.1
    found = Hessian(width)
    found.add(torch.randn(tokens, width, generator=made) @ mix * sizes)
    return torch.randn(ROWS, width, generator=made), damped(found.mean(), 0.01)[0]


def error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    return float(output_error(pruned.double() - weight.double(), hessian).sum())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_masks_have_their_pattern(data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 40))
    # Ties, zeros and subnormals are scores like any other.
    value = st.sampled_from([0.0, 1e-42, 1.0, 1.0, 2.5, 1e30])
    count = rows * width
    drawn = data.draw(st.lists(value, min_size=count, max_size=count))
    scores = torch.tensor(drawn).view(rows, width)
    of = data.draw(st.integers(2, 9))
    keep = data.draw(st.integers(1, of - 1))
    mask = parse_sparsity(f"{keep}:{of}", "x").mask(scores)
    for start in range(0, width, of):
        part, kept = scores[:, start : start + of], mask[:, start : start + of]
        assert bool((kept.sum(1) == min(keep, part.shape[1])).all())
        lost = torch.where(kept, -1.0, part).amax(1)
        assert bool((torch.where(kept, part, torch.inf).amin(1) >= lost).all())
    rate = data.draw(st.floats(0.01, 0.99))
    for scope, zeros in (("row", rows * round(rate * width)), ("matrix", round(rate * count))):
        mask = Sparsity(rate).mask(scores, scope)
        assert int((~mask).sum()) == zeros
        if scope == "row":
            assert bool(((~mask).sum(1) == round(rate * width)).all())


@pytest.mark.parametrize("text", ["50%", "0.1%", "2:4", "4:8", "33.3%"])
def test_names_of_patterns_are_read_back(text: str) -> None:
    assert parse_sparsity(text, "x").name == text
    assert parse_sparsity("0.5", "x") == parse_sparsity("50%", "x")


@pytest.mark.parametrize("text", ["0", "1", "100%", "0%", "4:4", "0:4", "5:4", "half", "1.5", "-1"])
def test_patterns_that_are_none(text: str) -> None:
    with pytest.raises(WrongOption, match=r"prune_wanda\.sparsity is no pattern of zeros"):
        PruneWanda(sparsity=text)


@pytest.mark.parametrize(
    ("written", "meant"),
    [("2:4", "2:4"), ("4:8", "4:8"), ('"2:4"', "2:4"), ("0.25", "25%"), ("50%", "50%")],
)
def test_recipes_may_leave_the_quotes_out(written: str, meant: str) -> None:
    text = f"name: mine\npasses:\n  - prune_magnitude: {{sparsity: {written}}}\n"
    (step,) = read_recipe(text).passes({})
    assert isinstance(step, PruneMagnitude)
    assert step.pattern.name == meant
    with pytest.raises(WrongOption):
        step.with_options({"sparsity": 1})


def test_a_short_last_group_keeps_no_more() -> None:
    pattern = parse_sparsity("2:4", "x")
    mask = pattern.mask(torch.tensor([[1.0, 2, 3, 4, 7, 5, 6]]))
    assert mask.tolist() == [[False, False, True, True, True, False, True]]
    assert pattern.holds(torch.where(mask, 1.0, 0.0))
    assert not pattern.holds(torch.ones(1, 7))


@pytest.mark.parametrize("name", PATTERNS)
def test_conjugate_gradients_go_to_the_least_squares(name: str) -> None:
    pattern = parse_sparsity(name, "x")
    for seed in range(6):
        weight, hessian = random_problem(seed)
        mask = pattern.mask(weight.abs(), "row")
        start = torch.where(mask, weight, 0)
        exact = solved_exactly(weight, mask, hessian)
        before, best = error(weight, start, hessian), error(weight, exact, hessian)
        errors = [before]
        for steps in (1, 4, 200):
            found = masked_least_squares(weight.double(), mask, hessian, start, steps)
            assert not bool(found[~mask].any())
            errors.append(error(weight, found, hessian))
        assert errors == sorted(errors, reverse=True)
        # The quadratic is flat at its least: an error of e in the values costs e^2.
        assert errors[-1] <= best * (1 + 1e-9)
        gradient = ((exact - weight.double()) @ hessian)[mask]
        # What is left of n equations solved stably: n roundings of the size of their terms.
        terms = hessian.abs().sum(1).max() * (exact.abs() + weight.abs()).max()
        assert gradient.abs().max() <= WIDTH * torch.finfo(torch.float64).eps * terms


@pytest.mark.parametrize("name", PATTERNS)
def test_the_order_of_the_methods(name: str) -> None:
    """Output error: magnitude, Wanda, SparseGPT as in the paper, then with its values solved."""
    pattern = parse_sparsity(name, "x")
    sums = torch.zeros(5)
    for seed in range(12):
        weight, hessian = random_problem(seed)
        norms = hessian.diagonal().sqrt()
        plain = torch.where(pattern.mask(weight.abs()), weight, 0)
        wanda = torch.where(pattern.mask(weight.abs() * norms, "row"), weight, 0)
        paper = sparsegpt(weight, hessian, pattern, "matrix")
        assert pattern.holds(paper)
        solved = masked_least_squares(weight, paper != 0, hessian, paper, 12)
        obc = solved_exactly(weight, obs_mask(weight, hessian, pattern, "matrix"), hessian)
        assert pattern.holds(obc)
        found = [error(weight, w, hessian) for w in (plain, wanda, paper, solved, obc)]
        assert found[3] <= found[2]
        sums += torch.tensor(found) / found[0]
    assert sums.tolist() == sorted(sums.tolist(), reverse=True)


def test_of_one_loss_a_row_obs_finds_the_best_by_exhaustion_and_sparsegpt_none_better() -> None:
    weight, hessian = random_problem(3, 4)
    pattern, every = parse_sparsity("3:4", "x"), ~torch.eye(4, dtype=torch.bool)
    best = sum(
        min(
            error(row[None], solved_exactly(row[None], mask[None], hessian), hessian)
            for mask in every
        )
        for row in weight
    )
    found = sparsegpt(weight, hessian, pattern, "row")
    # float32 against float64: four columns, each rounded a few times
    assert error(weight, found, hessian) >= best * (1 - 16 * torch.finfo(torch.float32).eps)
    mask = obs_mask(weight, hessian, pattern, "row")
    assert error(weight, solved_exactly(weight, mask, hessian), hessian) == pytest.approx(best)


def test_obs_takes_the_cheapest_of_all_rows() -> None:
    """At a share of one value in a matrix, that value is the cheapest of all by exhaustion."""
    weight, hessian = random_problem(5, 12)
    every = torch.ones_like(weight, dtype=torch.bool)
    costs = torch.empty_like(weight, dtype=torch.float64)
    for row, column in itertools.product(range(ROWS), range(12)):
        mask = every.clone()
        mask[row, column] = False
        costs[row, column] = error(weight, solved_exactly(weight, mask, hessian), hessian)
    one = Sparsity(1 / weight.numel())
    lost = (~obs_mask(weight, hessian, one, "matrix")).nonzero().tolist()
    assert lost == [list(divmod(int(costs.argmin()), 12))]


def stack(dtype: torch.dtype = torch.float32) -> Program:
    return capture_module(Stack(33, 50).eval().to(dtype), (torch.arange(10).reshape(2, 5),))


def texts(count: int = 6, length: int = 40) -> list[list[Tensor]]:
    made = torch.Generator().manual_seed(11)
    return [[torch.randint(0, 31, (2, length), generator=made)] for _ in range(count)]


def prune(step: WeightPruner, program: Program, batches: Any = None) -> Program:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PruningSavesNothing)
        given = texts() if batches is None else batches
        return Pipeline([step], verify="numbers").run(program, calibration=given)


def rows_of_products(program: Program) -> dict[str, Tensor]:
    """The weights of matmuls alone, as rows along the axis they sum over."""
    roles = [r for r in weight_roles(program) if r.matmuls and not r.tables and not r.others]
    return {
        r.name: program.weights[r.name].movedim(r.axis, -1).flatten(0, -2)
        for r in roles
        if r.axis is not None
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["50%", "2:4", "4:8"])
def test_the_pattern_lies_along_the_summed_axis(method: type[WeightPruner], name: str) -> None:
    before = stack()
    after = prune(method(sparsity=name), before)
    assert program_text(before) == program_text(after)
    found = rows_of_products(after)
    assert found.keys() == {"up.weight", "gate.weight", "down", "last.weight"}
    assert all(parse_sparsity(name, "x").holds(rows) for rows in found.values())
    assert torch.equal(before.weights["table.weight"], after.weights["table.weight"])
    assert after.facts >= {"dense_weights"}
    (record,) = after.history.records[-1:]
    assert [d.reason for d in record.declined] == ["%embedding looks rows of it up"]
    assert any(m.measure.startswith("share of zeros") and m.after >= 0.45 for m in record.measured)


def test_methods_that_know_the_inputs_keep_the_outputs_better() -> None:
    before = stack()
    flat = texts(2)[1]
    exact = run(before, flat, float64=True)[0]
    noises = [
        sqnr(exact, run(prune(method(sparsity="50%"), before), flat)[0]) for method in METHODS
    ]
    assert noises[:3] == sorted(noises[:3])
    assert noises[3] > noises[1]


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_keeps_its_dtype_and_its_zeros(method: type[WeightPruner]) -> None:
    after = prune(method(sparsity="2:4"), stack(torch.bfloat16))
    for name, rows in rows_of_products(after).items():
        assert after.weights.dtype(name) == torch.bfloat16
        assert parse_sparsity("2:4", "x").holds(rows)


def test_unstructured_zeros_are_said_to_save_nothing() -> None:
    with pytest.warns(PruningSavesNothing, match="save neither memory nor time"):
        after = Pipeline([PruneMagnitude()]).run(stack())
    record = after.history.records[-1]
    assert any("saves nothing on ordinary hardware" in a.note for a in record.applied)
    assert any("save neither memory nor time" in m.measure for m in record.measured)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PruningSavesNothing)
        record = Pipeline([PruneMagnitude(sparsity="2:4")]).run(stack()).history.records[-1]
    assert not any("saves nothing" in a.note for a in record.applied)


class Tied(nn.Module):
    """A head tied to the table, and a weight that is also added to its product."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(30, 24)
        self.mix = nn.Parameter(torch.randn(12, 24))
        self.out = nn.Linear(12, 24)

    def forward(self, ids: Tensor) -> Tensor:
        x = nn.functional.linear(self.table(ids), self.mix) + self.mix.sum(1)
        return nn.functional.linear(self.out(x), self.table.weight)


def test_other_uses_are_told() -> None:
    before = capture_module(Tied().eval(), (torch.arange(10).reshape(2, 5),))
    record = prune(PruneMagnitude(sparsity="2:4"), before).history.records[-1]
    reasons = {d.value: d.reason for d in record.declined}
    assert "tied to the matmul that reads it too" in reasons["table.weight"]
    assert "which is no matrix product" in reasons["mix"]
    assert [a.before for a in record.applied] == ["out.weight"]
    with pytest.raises(CannotPrune, match=r"table\.weight cannot be pruned") as caught:
        prune(PruneMagnitude(overrides="table=2:4"), before)
    assert "looks rows of it up, tied to the matmul" in str(caught.value)
    by_pattern = prune(PruneMagnitude(sparsity="2:4", overrides="*=1:4"), before)
    assert [a.before for a in by_pattern.history.records[-1].applied] == ["out.weight"]


def test_heads_onto_the_vocabulary_are_pruned_only_if_asked() -> None:
    before = captured("llama")
    batches = [list(before.examples)]
    after = prune(PruneWanda(sparsity="2:4"), before, batches)
    declined = {d.value: d.reason for d in after.history.records[-1].declined}
    (name,) = [n for n, reason in declined.items() if "head onto the vocabulary" in reason]
    assert torch.equal(after.weights[name], before.weights[name])
    for step in (
        PruneWanda(sparsity="2:4", heads=True),
        PruneWanda(sparsity="2:4", overrides=f"{name}=2:4"),
    ):
        assert parse_sparsity("2:4", "x").holds(prune(step, before, batches).weights[name])


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_routers_are_pruned_only_if_asked(name: str) -> None:
    before = pipeline("raise").run(captured(name))
    record = prune(PruneMagnitude(sparsity="2:4"), before).history.records[-1]
    routers = [d.value for d in record.declined if d.reason.startswith("a router:")]
    assert routers
    assert all(value.endswith("mlp.gate.weight") for value in routers)
    record = prune(PruneMagnitude(sparsity="2:4", heads=True), before).history.records[-1]
    assert set(routers) <= {a.before for a in record.applied}


class Positions(nn.Module):
    """As many positions as channels: what is added to the stream is no head for that."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.place, self.out = nn.Embedding(24, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.place(torch.arange(x.shape[-2])) + x)


def test_a_product_onto_the_residual_stream_is_no_head() -> None:
    before = capture_module(Positions().eval(), (torch.randn(2, 5, 24),))
    record = prune(PruneMagnitude(sparsity="2:4"), before).history.records[-1]
    assert [a.before for a in record.applied] == ["out.weight"]


def test_skips_and_overrides() -> None:
    step = PruneWanda(sparsity="2:4", skip="last.*", overrides="up=75%; down=none")
    after = prune(step, stack())
    record = after.history.records[-1]
    notes = {a.before: a.note for a in record.applied}
    assert notes.keys() == {"up.weight", "gate.weight"}
    assert "75%: 7" in notes["up.weight"]
    assert "2:4: " in notes["gate.weight"]
    reasons = {d.value: d.reason for d in record.declined}
    assert reasons["last.weight"] == "named in the option skip"
    assert reasons["down"] == "set to none by the option overrides"
    with pytest.raises(UnknownOption, match="no layer is called"):
        prune(PruneWanda(overrides="nowhere=2:4"), stack())


def test_dead_channels_and_short_calibration_are_told() -> None:
    record = prune(PruneSparsegpt(), stack(), texts(1, 20)).history.records[-1]
    notes = {a.before: a.note for a in record.applied}
    assert "1 dead input channels" in notes["up.weight"]
    assert "only 40 calibration tokens for 50 inputs" in notes["up.weight"]


def test_a_weight_that_meets_several_values_is_pruned_once_for_all_of_them() -> None:
    class Twice(Stack):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            return self.last((self.up(x) + self.up(torch.sin(3 * x))).relu() @ self.down)

    before = capture_module(Twice(33, 50).eval(), (torch.arange(10).reshape(2, 5),))
    flat = texts(2)[1]
    exact = run(before, flat, float64=True)[0]
    plain = sqnr(exact, run(prune(PruneMagnitude(), before), flat)[0])
    for method in (PruneWanda, PruneSparsegpt):
        after = prune(method(), before)
        assert [a.before for a in after.history.records[-1].applied].count("up.weight") == 1
    assert sqnr(exact, run(after, flat)[0]) > plain


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "t5"])
def test_real_graphs(name: str) -> None:
    before = captured(name)
    batches = [list(before.examples)]
    exact = run(before, batches[0], float64=True)[0]
    found: list[float] = []
    for method in (PruneMagnitude, PruneSparsegpt):
        after = prune(method(sparsity="2:4", heads=True), before, batches)
        rows = rows_of_products(after)
        assert rows
        assert all(parse_sparsity("2:4", "x").holds(part) for part in rows.values())
        found.append(sqnr(exact, run(after, batches[0])[0]))
    assert found[1] > found[0]


def test_stacks_of_experts_are_pruned_by_magnitude_and_told() -> None:
    before = captured("mixtral")
    record = prune(PruneWanda(sparsity="2:4"), before, [list(before.examples)]).history.records[-1]
    told = [a.before for a in record.applied if "by magnitude: no single input" in a.note]
    assert told
    assert all("experts" in name for name in told)


def test_bad_input() -> None:
    with pytest.raises(WrongOption, match=r"prune_magnitude\.scope cannot be 'all'"):
        PruneMagnitude(scope="all")
    with pytest.raises(WrongOption, match=r"prune_sparsegpt\.damp is out of range"):
        PruneSparsegpt(damp=-1)
    with pytest.raises(WrongOption, match=r"prune_sparsegpt\.steps is out of range"):
        PruneSparsegpt(steps=-1)
    with pytest.raises(WrongOrder, match="needs calibration batches"):
        Pipeline([PruneWanda()]).run(stack())
    with pytest.raises(WrongOrder, match="dense_weights"):
        Pipeline([QuantizeWeights(), PruneMagnitude()]).run(stack())
    program = stack()
    program.weights["up.weight"] = program.weights["up.weight"] * float("nan")
    with pytest.raises(NonFiniteWeight):
        prune(PruneMagnitude(), program)
