"""Importance of units: gradients are those that finite differences find; what cannot is refused."""

from __future__ import annotations

import planish
import pytest
import torch
import zoo
from cut_checks import doubled, raised
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.ir.channel_map import ChannelMap, channel_map
from planish.ir.errors import CalibrationTooSmall
from planish.ir.find_units import find_units
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.ir.prunable_units import Unit
from planish.ir.rewrite import Journal
from planish.passes.contract import Context
from planish.passes.next_token_loss import NoNextToken, next_token_loss
from planish.passes.unit_gradients import _add_sums, unit_gradients
from planish.passes.unit_importance import MEASURES, unit_importance
from planish.recipes import pipeline


def batches(program: Program, name: str, count: int) -> list[list[object]]:
    sample = zoo.build(name, zoo.ARCHITECTURES[name].attentions[0])
    return [program.flatten_inputs((), sample.other_inputs(2, 11, seed)) for seed in range(count)]


def scaled(program: Program, channels: ChannelMap, unit: Unit, factor: float) -> Program:
    """The program with every weight entry of a unit multiplied, each once."""
    twin = program.copy()
    for name, axes in channels.dead_entries(unit.roots).items():
        offset = channels.offsets.get(name, 0.0)
        weight = twin.weights[name] + offset
        chosen = torch.zeros(weight.shape, dtype=torch.bool)
        for axis, gone in axes.items():
            chosen |= gone.reshape([-1 if a == axis else 1 for a in range(weight.dim())])
        twin.weights[name] = torch.where(chosen, weight * factor, weight) - offset
    return twin


def difference(
    program: Program, channels: ChannelMap, unit: Unit, batch: list[object], step: float
) -> float:
    loss = next_token_loss(program)
    values = [
        float(loss(batch, run(scaled(program, channels, unit, f), batch, float64=True)))
        for f in (1 + step, 1 - step)
    ]
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gpt2",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma2", "mixtral", "t5")),
    ],
)
def test_taylor_is_the_slope_of_the_loss_under_scaling(name: str) -> None:
    program = doubled(raised(name))
    channels = channel_map(program)
    units = find_units(program, channels, ["heads", "ffn", "width"])
    chosen = units[:: len(units) // 4]
    several = batches(program, name, 2)
    found = unit_gradients(program, channels, chosen, Context(Journal(program), several))
    for place, unit in enumerate(chosen):
        slopes = [
            [difference(program, channels, unit, b, step) for b in several] for step in (1e-3, 5e-4)
        ]
        # the error of a central difference falls with the square of its step: a third of what
        # halving the step changed; twice that for the next order; and the loss's own rounding
        # (a few units in the last place of sums of some thousand terms) over the step
        rough, fine = (torch.tensor(s, dtype=torch.float64) for s in slopes)
        rounding = 4096 * torch.finfo(torch.float64).eps * 5 / 5e-4
        limit = 2 * (rough - fine).abs() / 3 + rounding
        assert abs(float(fine.mean() - found.mean[place])) <= float(limit.mean()), unit.label
        square = float((fine.square().mean() - found.square[place]).abs())
        assert square <= float((limit * (2 * fine.abs() + limit)).mean()), unit.label


def test_float32_gradients_are_those_of_float64() -> None:
    program = raised("llama")
    channels = channel_map(program)
    units = find_units(program, channels, ["heads", "ffn", "width"])
    context = Context(Journal(program), batches(program, "llama", 2))
    ours = unit_gradients(program, channels, units, context).mean
    wide = unit_gradients(doubled(program), channels, units, context).mean
    # sums of at most 100 x 80 products, each of values that two layers rounded a few times
    assert float((ours - wide).norm() / wide.norm()) < 100 * torch.finfo(torch.float32).eps


def test_half_precision_weights_give_finite_float_sums() -> None:
    program = raised("llama")
    half = program.copy()
    for name in list(half.weights):
        if half.weights.dtype(name) == torch.float32:
            half.weights[name] = half.weights[name].half()
    channels = channel_map(half)
    units = find_units(half, channels, ["ffn"])
    context = Context(Journal(half), batches(program, "llama", 1))
    ours = unit_gradients(half, channels, units, context).mean
    wide = unit_gradients(program, channels, units, context).mean
    assert float((ours - wide).norm() / wide.norm()) < 64 * torch.finfo(torch.float16).eps


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
    count=st.integers(1, 3),
)
def test_entries_count_once_for_each_unit(shape: list[int], seed: int, count: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    product = torch.randint(-8, 9, shape, generator=draw).float()
    owners = {a: torch.randint(-1, count, (n,), generator=draw) for a, n in enumerate(shape)}
    sums = torch.zeros(count, dtype=torch.float64)
    _add_sums(product, owners, sums)
    for unit in range(count):
        mine = torch.zeros(shape, dtype=torch.bool)
        for axis, own in owners.items():
            mine |= (own == unit).reshape([-1 if a == axis else 1 for a in range(len(shape))])
        assert float(sums[unit]) == float(product[mine].sum())


class Tagger(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(30, 6)
        self.up, self.down = torch.nn.Linear(6, 20), torch.nn.Linear(20, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(self.table(ids))))


@pytest.mark.parametrize("measure", ["taylor", "fisher"])
def test_programs_without_next_tokens_are_refused(measure: str) -> None:
    ids = torch.arange(10).reshape(2, 5)
    program = pipeline("raise").run(planish.trace(Tagger(), (ids,)))
    channels = channel_map(program)
    units = find_units(program, channels, ["ffn"])
    with pytest.raises(NoNextToken, match="as many words as a table"):
        unit_importance(program, channels, units, measure, Context(Journal(program), [[ids]]))


def test_one_token_has_no_next_and_no_batches_are_refused() -> None:
    program = raised("gpt2")
    sample = zoo.build("gpt2", zoo.ARCHITECTURES["gpt2"].attentions[0])
    batch = program.flatten_inputs((), sample.other_inputs(2, 11))
    loss = next_token_loss(program)
    results = run(program, batch)
    short = [v[:, :1] if isinstance(v, torch.Tensor) else v for v in batch]
    with pytest.raises(NoNextToken, match="logits are"):
        loss(short, results)
    channels = channel_map(program)
    with pytest.raises(CalibrationTooSmall):
        unit_gradients(program, channels, [], Context(Journal(program), []))


def test_masked_positions_do_not_count() -> None:
    program = raised("llama")
    loss = next_token_loss(program)
    assert loss.mask is not None
    ids = torch.arange(1, 13).reshape(2, 6)
    logits = torch.randn(2, 6, 97, generator=torch.Generator().manual_seed(0))
    flat: list[object] = [None] * len(program.inputs)
    flat[loss.ids], flat[loss.mask] = ids, torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    logs = logits.log_softmax(-1)
    kept = [(0, t) for t in (2, 3, 4)] + [(1, t) for t in range(5)]
    wanted = -sum(float(logs[b, t, ids[b, t + 1]]) for b, t in kept) / len(kept)
    assert float(loss(flat, [logits])) == pytest.approx(wanted, rel=8 * torch.finfo().eps)


@pytest.mark.parametrize("measure", MEASURES)
def test_zero_weights_matter_least(measure: str) -> None:
    program = raised("llama")
    channels = channel_map(program)
    units = find_units(program, channels, ["ffn"])
    twin = program.copy()
    for name, axes in channels.dead_entries(units[7].roots).items():
        for axis, gone in axes.items():
            twin.weights[name] = twin.weights[name].index_fill(axis, gone.nonzero().flatten(), 0.0)
    context = Context(Journal(twin), batches(program, "llama", 2))
    scores = unit_importance(twin, channel_map(twin), units, measure, context)
    assert scores[7] == 0 and min(s for i, s in enumerate(scores) if i != 7) > 0
