"""Learned gates: the paper's distribution, gates that mean what a cut means, units that count."""

from __future__ import annotations

import math
from collections.abc import Sequence

import planish
import pytest
import torch
import zoo
from captured import captured
from cut_checks import doubled, gap
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.distill_losses import hard_loss, next_tokens
from planish.distillation import distill
from planish.ir.channel_map import channel_map
from planish.ir.cut_channels import masked
from planish.ir.errors import PlanishError, WrongInput, WrongOption
from planish.ir.find_units import find_units
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.ir.prunable_units import Kind, Unit
from planish.ir.rewrite import Journal
from planish.passes.contract import Context
from planish.passes.gate_loss import gate_loss
from planish.passes.gated_weights import GatedWeights
from planish.passes.hard_concrete import (
    log_alpha_of,
    open_share,
    sampled_gates,
    settled_gates,
)
from planish.passes.learned_gates import learn_scores
from planish.passes.next_token_loss import next_token_loss
from planish.passes.unit_importance import unit_importance
from planish.recipes import pipeline
from speculation import raised as decoder
from torch import Tensor, nn

SOME = ["llama", "gpt2", "bert", "mixtral"]


def raised(name: str) -> Program:
    return pipeline("raise").run(captured(name, zoo.ARCHITECTURES[name].attentions[0]))


def groups(units: list[Unit]) -> dict[tuple[Kind, str], list[int]]:
    found: dict[tuple[Kind, str], list[int]] = {}
    for place, unit in enumerate(units):
        found.setdefault((unit.kind, unit.group), []).append(place)
    return found


def least(scores: Sequence[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=scores.__getitem__)[:count])


@given(st.floats(-30, 30), st.floats(0, 1))
def test_gates_are_numbers_from_0_to_1(log_alpha: float, uniform: float) -> None:
    alpha = torch.tensor([log_alpha], requires_grad=True)
    gate = sampled_gates(alpha, torch.tensor([uniform]))
    assert 0 <= float(gate.detach()) <= 1
    gate.sum().backward()
    assert alpha.grad is not None and bool(alpha.grad.isfinite())
    assert 0 <= float(settled_gates(alpha.detach())) <= 1


@settings(max_examples=20, deadline=None)
@given(st.floats(0.02, 0.98), st.integers(0, 99))
def test_gates_are_open_as_often_as_said(share: float, seed: int) -> None:
    """Eq. 12 of the paper: within five standard deviations of so many draws."""
    count = 20000
    alpha = torch.full((count,), log_alpha_of(share))
    assert float(open_share(alpha[0].double())) == pytest.approx(share, rel=1e-6)
    drawn = sampled_gates(alpha, torch.rand(count, generator=torch.Generator().manual_seed(seed)))
    seen = float((drawn > 0).float().mean())
    assert abs(seen - share) <= 5 * math.sqrt(share * (1 - share) / count)


def check_gates(name: str, attention: zoo.Attention, kind: Kind) -> None:
    """Gates of 0 and 1 are the program without the units, weights in float64."""
    program = doubled(pipeline("raise").run(captured(name, attention)))
    channels = channel_map(program)
    units = find_units(program, channels, [kind])
    if not units:
        return
    weights = GatedWeights(program, channels, units)
    gates = torch.ones(len(units), dtype=torch.float64)
    flat = list(program.examples)
    weights.set(gates)
    for dead in (set[int](), set(range(1, len(units), 3))):
        gates = gates.index_fill(0, torch.tensor(sorted(dead), dtype=torch.int64), 0.0)
        weights.set(gates)
        gone = {root for place in dead for root in units[place].roots}
        twin = masked(program, channels, gone)
        found, wanted = (
            run(p, flat, float64=True, weight=w)
            for p, w in ((program, weights), (twin, twin.weights.__getitem__))
        )
        for a, b in zip(found, wanted, strict=True):
            if b.is_floating_point():
                limit = 4096 * torch.finfo(torch.float64).eps * float(b.abs().max())
                assert float((a - b).abs().max()) <= limit
    assert gap(program, twin) > 1e-3  # what is closed mattered


@pytest.mark.parametrize("kind", ["ffn", "heads", "width"])
@pytest.mark.parametrize("name", SOME)
def test_closed_gates_are_a_cut(name: str, kind: Kind) -> None:
    check_gates(name, zoo.ARCHITECTURES[name].attentions[0], kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ffn", "heads", "width"])
@pytest.mark.parametrize(
    ("name", "attention"),
    [(n, a) for n, form in zoo.ARCHITECTURES.items() for a in form.attentions],
)
def test_closed_gates_are_a_cut_everywhere(name: str, attention: zoo.Attention, kind: Kind) -> None:
    check_gates(name, attention, kind)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


DEAD = [1, 4, 9, 16, 20, 23]


def planted() -> Program:
    """Six units that nobody reads, with the largest rows of all."""
    torch.manual_seed(0)
    model = Mlp().eval()
    with torch.no_grad():
        model.up.weight[DEAD] *= 20
        model.down.weight[:, DEAD] = 0
    return pipeline("raise").run(planish.trace(model, (torch.randn(7, 6),)))


def vectors(count: int = 4) -> list[list[Tensor]]:
    made = torch.Generator().manual_seed(1)
    return [[torch.randn(64, 6, generator=made)] for _ in range(count)]


def test_units_that_nobody_reads_are_found() -> None:
    program = planted()
    before = {name: program.weights[name].clone() for name in program.weights}
    channels = channel_map(program)
    units = find_units(program, channels, ["ffn"])
    (name,) = groups(units)
    context = Context(Journal(program), vectors())
    told: list[tuple[int, int]] = []
    context.progress = lambda done, total, what: told.append((done, total))
    keep = {name: len(units) - len(DEAD)}
    scores = learn_scores(program, channels, units, keep, context)
    assert least(scores, len(DEAD)) == DEAD
    assert told[-1] == (200, 200)
    assert sum(scores) == pytest.approx(keep[name], abs=1.0)
    by_size = unit_importance(program, channels, units, "magnitude", context)
    assert not set(least(by_size, len(DEAD))) & set(DEAD)
    assert all(torch.equal(program.weights[n], value) for n, value in before.items())


def progressions(count: int, seed: int) -> list[Tensor]:
    """Texts of rows a, a + b, a + 2 b, ... modulo 89."""
    made = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    for _ in range(count):
        first = torch.randint(0, 89, (8, 1), generator=made)
        step = torch.randint(1, 9, (8, 1), generator=made)
        found.append((first + step * torch.arange(16)) % 89 + 3)
    return found


def test_a_trained_decoder_loses_less_than_by_any_other_measure() -> None:
    """Half of the channels go, chosen on 16 texts; the loss is that of texts never seen."""
    start = decoder("llama")
    learn, held = progressions(40, 0), progressions(6, 5)
    batches = [{"input_ids": ids} for ids in learn]
    program = distill(start, start, batches, steps=300, lr=5e-3, hard_weight=1.0, soft_weight=0.0)
    labels = next_tokens(program)
    channels = channel_map(program)
    units = find_units(program, channels, ["ffn"])
    places = groups(units)
    keep = {name: len(held) // 2 for name, held in places.items()}

    def loss(scores: Sequence[float]) -> float:
        dead: set[int] = set()
        for name, here in places.items():
            gone = least([scores[place] for place in here], len(here) - keep[name])
            dead |= {root for i in gone for root in units[here[i]].roots}
        twin = masked(program, channels, dead)
        found = [hard_loss(run(twin, [ids])[0], labels([ids])) for ids in held]
        return float(torch.stack(found).mean())

    context = Context(Journal(program), [[ids] for ids in learn[:16]])
    learned = learn_scores(program, channels, units, keep, context)
    for measure in ("magnitude", "wanda"):
        other = unit_importance(program, channels, units, measure, context)
        assert loss(learned) < loss(other), measure


def test_the_same_seed_gives_the_same_scores() -> None:
    program = planted()
    channels = channel_map(program)
    units = find_units(program, channels, ["ffn"])
    (name,) = groups(units)

    def learned(seed: int) -> list[float]:
        context = Context(Journal(program), vectors())
        keep = {name: 12}
        return learn_scores(program, channels, units, keep, context, steps=8, seed=seed)

    assert learned(3) == learned(3) != learned(4)


def test_groups_that_keep_all_are_left_alone() -> None:
    program = decoder("llama")
    channels = channel_map(program)
    units = find_units(program, channels, ["ffn"])
    first, second = groups(units).items()
    context = Context(Journal(program), [[progressions(1, 0)[0]]])
    keep = {first[0]: 40, second[0]: len(second[1])}
    scores = learn_scores(program, channels, units, keep, context, steps=2)
    assert all(scores[place] == 1.0 for place in second[1])
    assert all(0 < scores[place] < 1 for place in first[1])
    whole = {name: len(held) for name, held in (first, second)}
    assert learn_scores(program, channels, units, whole, context) == [1.0] * len(units)


@pytest.mark.parametrize(
    ("name", "next_tokens"), [("llama", True), ("gpt2", True), ("bert", False), ("vit", False)]
)
def test_the_loss_is_of_the_text_where_a_model_foretells_it(name: str, next_tokens: bool) -> None:
    program = raised(name)
    assert (gate_loss(program, program.examples).next_tokens is not None) == next_tokens


class SeesAll(nn.Module):
    """Words for every place of a text, from all of the text: no next tokens are foretold."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(97, 8), nn.Linear(8, 97)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head(x + x.mean(1, keepdim=True))


def test_logits_that_see_the_text_to_come_are_no_next_tokens() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 97, (2, 11))
    program = pipeline("raise").run(planish.trace(SeesAll().eval(), (ids,)))
    assert next_token_loss(program).logits == 0  # the form alone would be that of a decoder
    assert gate_loss(program, [ids]).next_tokens is None


def test_bad_wishes_are_told() -> None:
    program = planted()
    channels = channel_map(program)
    units = find_units(program, channels, ["ffn"])
    (name,) = groups(units)
    context = Context(Journal(program), vectors())
    with pytest.raises(WrongInput, match="99 of the ffn of up cannot be kept"):
        learn_scores(program, channels, units, {name: 99}, context)
    with pytest.raises(WrongOption, match="gates cannot be learned"):
        learn_scores(program, channels, units, {name: 9}, context, steps=0)
    with pytest.raises(PlanishError, match="calibration"):
        learn_scores(program, channels, units, {name: 9}, Context(Journal(program)))
    context.calibration[0][0][3, 2] = math.inf
    with pytest.raises(PlanishError, match="batch 0"):
        learn_scores(program, channels, units, {name: 9}, context)
