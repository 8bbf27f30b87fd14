"""reconstruct_columns: what stays takes over from what goes, as far as least squares can."""

from __future__ import annotations

import build
import pytest
import torch
import zoo
from captured import captured
from hypothesis import given, settings
from hypothesis import strategies as st
from planish import op
from planish.ir.errors import WrongInput
from planish.ir.held_out_damp import held_out_damp
from planish.ir.interpret import run
from planish.ir.paired_moments import PairedMoments
from planish.ir.program import Program
from planish.ir.rewrite import Journal
from planish.passes.calibrate import product_sites
from planish.passes.contract import Context
from planish.passes.reconstruct_columns import reconstruct_columns
from torch import Tensor

EPS = torch.finfo(torch.float32).eps


def mlp(seed: int = 0, bias: bool = True) -> Program:
    """x + down(relu(up(x))), hidden channels 0 and 1 the same, channel 2 constant."""
    made = torch.Generator().manual_seed(seed)
    up = torch.randn(11, 6, generator=made)
    up[1], up[2] = up[0], 0.0
    start = torch.randn(11, generator=made)
    start[1], start[2] = start[0], 1.5
    weights = {"up.w": up, "up.b": start, "down.w": torch.randn(6, 11, generator=made)}
    if bias:
        weights["down.b"] = torch.randn(6, generator=made)

    def body(x: Tensor, up: Tensor, start: Tensor, down: Tensor, end: Tensor | None = None):
        return op.add(x, op.linear(op.relu(op.linear(x, up, start)), down, end))

    return build.program(body, {"x": torch.randn(4, 6, generator=made)}, weights)


def batches(count: int = 5, seed: int = 1) -> list[list[Tensor]]:
    made = torch.Generator().manual_seed(seed)
    return [[torch.randn(16, 6, generator=made)] for _ in range(count)]


def dead(size: int, *places: int) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(places)] = True
    return mask


def context(program: Program, given: list[list[Tensor]], skip: tuple[int, ...] = ()) -> Context:
    return Context(Journal(program, skip=skip), given)


def change(program: Program, other: Program, given: list[list[Tensor]]) -> float:
    """How far the outputs of two programs are apart, squared, summed, in float64."""
    total = 0.0
    for flat in given:
        ours, theirs = (run(p, flat, float64=True)[0] for p in (program, other))
        total += float((ours - theirs).square().sum())
    return total


def cut_alone(program: Program, name: str, axis: int, mask: Tensor) -> Program:
    done = program.copy()
    weight = done.weights[name].clone()
    weight.movedim(axis, 0)[mask] = 0
    done.weights[name] = weight
    return done


def test_what_others_can_say_is_not_lost() -> None:
    """A twin channel and a constant one cost nothing: another column and the bias hold them."""
    whole, given = mlp(), batches()
    done = whole.copy()
    journal = context(done, given)
    reconstruct_columns(done, {"down.w": {1: dead(11, 1, 2)}}, journal, damp=0.0)
    assert not done.weights["down.w"][:, [1, 2]].any()
    old = whole.weights["down.w"]
    # Sums of float32 over 80 tokens, amplified by the moments' condition (below 1e4 here).
    near = 80 * EPS * 1e4 * float(old.norm())
    wanted = old.clone()
    wanted[:, 0] += wanted[:, 1]
    wanted[:, [1, 2]] = 0
    assert float((done.weights["down.w"] - wanted).norm()) < near
    shift = done.weights["down.b"] - whole.weights["down.b"]
    assert float((shift - 1.5 * old[:, 2]).norm()) < near
    (record,) = journal.journal.applied_records(done)
    assert record.before == "down.w"
    assert "2 of 11 columns; output error " in record.note


@settings(max_examples=30, deadline=None)
@given(
    st.sets(st.integers(0, 10), max_size=11),
    st.booleans(),
    st.sampled_from([0.0, 0.01, 1.0]),
    st.integers(0, 50),
)
def test_it_is_never_worse_than_the_cut_alone(
    places: set[int], bias: bool, damp: float, seed: int
) -> None:
    whole, given = mlp(seed, bias), batches(seed=seed + 1)
    mask = dead(11, *places)
    done = whole.copy()
    reconstruct_columns(done, {"down.w": {-1: mask}}, context(done, given), damp=damp)
    assert not done.weights["down.w"][:, mask].any()
    before = change(whole, cut_alone(whole, "down.w", 1, mask), given)
    size = sum(float(run(whole, flat, float64=True)[0].square().sum()) for flat in given)
    # float32 sums over 80 tokens and the rounding of the new weights, times the largest column.
    slack = 80 * EPS * size * (1 + float(whole.weights["down.w"].norm())) ** 2
    assert change(whole, done, given) <= before + slack


def test_it_is_the_answer_of_least_squares() -> None:
    whole, given = mlp(bias=False), batches(20)
    mask = dead(11, 1, 2, 5, 7)
    done = whole.copy()
    reconstruct_columns(done, {"down.w": {1: mask}}, context(done, given), damp=0.0)
    x = torch.cat([flat[0] for flat in given]).double()
    hidden = (x @ whole.weights["up.w"].double().t() + whole.weights["up.b"].double()).relu()
    wanted = hidden @ whole.weights["down.w"].double().t()
    best = torch.linalg.lstsq(hidden[:, ~mask], wanted).solution.t()
    condition = float(torch.linalg.cond(hidden[:, ~mask])) ** 2
    gap = (done.weights["down.w"][:, ~mask].double() - best).norm() / best.norm()
    assert float(gap) < len(x) * EPS * condition


def test_a_rewrite_that_is_not_wanted_only_zeroes() -> None:
    whole, mask = mlp(), dead(11, 3)
    done = whole.copy()
    reconstruct_columns(done, {"down.w": {1: mask}}, context(done, batches(), skip=(1,)))
    assert torch.equal(
        done.weights["down.w"], cut_alone(whole, "down.w", 1, mask).weights["down.w"]
    )
    assert torch.equal(done.weights["down.b"], whole.weights["down.b"])


def test_a_mask_that_does_not_fit() -> None:
    program = mlp()
    with pytest.raises(WrongInput, match=r"what is to be cut of down\.w does not fit it"):
        reconstruct_columns(program, {"down.w": {0: dead(11, 1)}}, context(program, batches()))


FFN: list[tuple[str, zoo.Attention, str]] = [
    ("llama", "sdpa", "down_proj.weight"),
    ("gpt2", "sdpa", "mlp.c_proj.weight"),  # [in, out], a bias through addmm
    ("bert", "sdpa", "output.dense.weight"),
]


@pytest.mark.parametrize(("name", "attention", "ending"), FFN)
def test_layers_of_models_lose_less(name: str, attention: zoo.Attention, ending: str) -> None:
    whole = captured(name, attention)
    made = torch.Generator().manual_seed(2)
    given = []
    for _ in range(4):
        ids = torch.randint(3, zoo.VOCABULARY, (4, 32), generator=made)
        given.append(
            [
                ids if v.dtype == torch.int64 and k == 0 else torch.ones_like(ids)
                for k, v in enumerate(whole.examples)
            ]
        )
    masks: dict[str, dict[int, Tensor]] = {}
    for site in product_sites(whole):
        for product in site.products:
            if product.weight.endswith(ending) and "attention" not in product.weight:
                masks[product.weight] = {product.axis: dead(site.width, *range(0, site.width, 4))}
    assert masks
    done, alone = whole.copy(), whole.copy()
    work = context(done, given)
    reconstruct_columns(done, masks, work)
    for weight, places in masks.items():
        for axis, mask in places.items():
            alone = cut_alone(alone, weight, axis, mask)
            assert not done.weights[weight].movedim(axis, 0)[mask].any()
    assert change(whole, done, given) < change(whole, alone, given)
    assert len(work.journal.applied_records(done)) == len(masks)


def test_experts_are_zeroed_and_said_to_be() -> None:
    whole = captured("mixtral", "sdpa")
    name = next(n for n in whole.weights if n.endswith("experts.down_proj"))
    shape = whole.weights.shape(name)
    done = whole.copy()
    work = context(done, [list(whole.examples)])
    reconstruct_columns(done, {name: {-1: dead(shape[-1], 0)}}, work)
    assert not done.weights[name][..., 0].any()
    (declined,) = work.journal.declined_records()
    assert declined.reason.startswith("no single input of its own is known")


def noisy(tokens: int, seed: int) -> tuple[PairedMoments, PairedMoments, Tensor, Tensor]:
    """Two halves of tokens whose 12 inputs say nothing of each other, and a weight [5, 12]."""
    made = torch.Generator().manual_seed(seed)
    halves = PairedMoments(12), PairedMoments(12)
    for half in halves:
        half.add(torch.randn(tokens, 12, generator=made))
    return *halves, torch.randn(5, 12, generator=made), dead(12, 0, 3, 7)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 200), st.booleans())
def test_few_tokens_are_believed_less_than_many(seed: int, centred: bool) -> None:
    """Inputs that are independent can hold nothing of each other: what few tokens say is noise."""
    first, second, weight, mask = noisy(14, seed)
    few = held_out_damp((first, second), weight, mask, 0.01, centred)
    assert few > 0.01
    alone = PairedMoments(12)
    assert held_out_damp((first, alone), weight, mask, 0.01, centred) == 0.01


def test_what_inputs_do_say_is_believed() -> None:
    made = torch.Generator().manual_seed(0)
    halves = PairedMoments(12), PairedMoments(12)
    mixing = torch.randn(4, 12, generator=made)
    for half in halves:
        half.add(torch.randn(500, 4, generator=made) @ mixing)
    weight = torch.randn(5, 12, generator=made)
    assert held_out_damp(halves, weight, dead(12, 0, 3, 7), 0.01, False) == 0.01


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 200), st.booleans())
def test_the_error_is_that_of_the_tokens(seed: int, centred: bool) -> None:
    """As the sum over tokens says, from the weight as it was to another one, in float64."""
    made = torch.Generator().manual_seed(seed)
    now, gap = (torch.randn(9, 6, generator=made) for _ in range(2))
    owed, (weight, other) = (
        torch.randn(9, 4, generator=made),
        (torch.randn(4, 6, generator=made) for _ in range(2)),
    )
    moments = PairedMoments(6)
    moments.add(now, now + gap, owed)
    found = moments.error(weight, other, centred) - moments.error(weight, weight, centred)

    def left(matrix: Tensor) -> float:
        wanted = (now + gap).double() @ weight.double().t() + owed.double()
        apart = wanted - now.double() @ matrix.double().t()
        apart = apart - apart.mean(0) if centred else apart
        return float(apart.square().sum() / len(now))

    # Moments are float32 sums of 9 products of numbers up to about 4, times weights up to 4 twice.
    limit = 9 * EPS * 4**4 * 6 * 6 * 4
    assert abs(found - (left(other) - left(weight))) <= limit
