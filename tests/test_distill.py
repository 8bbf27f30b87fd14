"""Distillation: losses as in the papers, a stop that changes no bit, students that learn."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path
from typing import Any

import planish
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.distill_losses import IGNORED, hidden_loss, next_tokens, soft_loss
from planish.distill_student import every_other_layer, pairs_of_layers, teacher_sequences
from planish.distillation import distill
from planish.ir.errors import PlanishError, WrongInput, WrongOption
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.ir.read_safetensors import read_safetensors
from planish.ir.weight_roles import weight_roles
from planish.trainable import Trainable, trained_weights
from speculation import raised
from torch import Tensor, nn
from zoo import VOCABULARY

ROOT = Path(__file__).resolve().parent.parent
EPS = torch.finfo(torch.float32).eps


def batches(count: int = 4, length: int = 11) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids} for ids in texts(count, length)]


def texts(count: int = 1, length: int = 11) -> list[Tensor]:
    made = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (2, length), generator=made) for _ in range(count)]


def same(a: Program, b: Program) -> bool:
    return all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)


class Stop(Exception):
    """Raised by a test to interrupt a training."""


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.floats(0.25, 8.0))
def test_soft_targets_are_the_divergence(seed: int, temperature: float) -> None:
    made = torch.Generator().manual_seed(seed)
    ours, theirs = (torch.randn(2, 5, 7, generator=made).double() for _ in range(2))
    p, q = (theirs / temperature).softmax(-1), (ours / temperature).softmax(-1)
    wanted = float((p * (p / q).log()).sum(-1).mean()) * temperature**2
    found = float(soft_loss(ours, theirs, temperature, None))
    # Logarithms up to 2 * 6 / 0.25 (float32), cancelling in a sum of 7, times T^2.
    assert abs(found - wanted) <= 7 * EPS * 48 / min(temperature, 1.0) * max(temperature**2, 1.0)
    assert float(soft_loss(theirs, theirs, temperature, None)) == pytest.approx(0.0, abs=48 * EPS)


def test_soft_targets_look_only_where_they_shall() -> None:
    ours, theirs = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    seen = torch.zeros(2, 5, dtype=torch.bool)
    seen[0, :3] = True
    assert torch.equal(
        soft_loss(ours, theirs, 2.0, seen), soft_loss(ours[0, :3], theirs[0, :3], 2.0, None)
    )
    assert float(hidden_loss(theirs, theirs, seen)) == 0.0


def test_hard_targets_are_the_next_tokens() -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 4]])
    labels = next_tokens(raised("llama"))([ids])
    assert labels.tolist() == [[6, 7, IGNORED], [9, 4, IGNORED]]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_gradients_are_those_of_the_function(name: str) -> None:
    """The slope along the gradient is its squared length; checkpointing changes no bit."""
    program = raised(name)
    (ids,) = texts()
    slopes: list[dict[str, Tensor]] = []
    for stops in (None, [pair[0] for pair in pairs_of_layers(program, program)]):
        work = Trainable(program, trained_weights(program), stops)
        logits, _ = work([ids])
        assert torch.equal(logits.detach(), run(program, [ids])[0])
        logits.square().mean().backward()
        slopes.append({n: p.grad for n, p in work.parameters.items() if p.grad is not None})
    assert slopes[0].keys() == slopes[1].keys()
    assert all(torch.equal(slopes[0][n], slopes[1][n]) for n in slopes[0])
    matrices = {role.name for role in weight_roles(program) if role.matmuls}
    assert matrices & set(slopes[0])


def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    teacher = raised("llama", layers=3)
    student = every_other_layer(teacher)
    options: dict[str, Any] = {"steps": 9, "lr": 1e-3, "hidden_weight": 1.0}
    whole = distill(student, teacher, batches(), **options)

    def interrupt(step: int, losses: object) -> None:
        if step == 5:
            raise Stop

    with pytest.raises(Stop):
        distill(
            student, teacher, batches(), folder=tmp_path, save_every=2, on_step=interrupt, **options
        )
    (state,) = tmp_path.glob("*/state.safetensors")
    assert int(read_safetensors(state)["steps"]) == 4
    steps: list[int] = []
    resumed = distill(
        student,
        teacher,
        batches(),
        folder=tmp_path,
        on_step=lambda s, _: steps.append(s),
        **options,
    )
    assert steps == [5, 6, 7, 8, 9]
    assert same(whole, resumed)
    assert not same(whole, student)
    checkpointed = distill(student, teacher, batches(), checkpointing=True, **options)
    assert same(whole, checkpointed)


def test_a_state_of_another_training_is_not_taken(tmp_path: Path) -> None:
    teacher = raised("llama", layers=3)
    student = every_other_layer(teacher)
    for rate in (1e-3, 2e-3):
        steps: list[int] = []
        distill(
            student,
            teacher,
            batches(),
            steps=2,
            lr=rate,
            folder=tmp_path,
            on_step=lambda s, _, to=steps: to.append(s),
        )
        assert steps == [1, 2]
    assert len(list(tmp_path.glob("*/state.safetensors"))) == 2


def test_a_damaged_state_is_told(tmp_path: Path) -> None:
    teacher = raised("llama", layers=3)
    student = every_other_layer(teacher)
    distill(student, teacher, batches(), steps=2, folder=tmp_path)
    (state,) = tmp_path.glob("*/state.safetensors")
    state.write_bytes(state.read_bytes()[:-7])
    with pytest.raises(PlanishError, match=r"state\.safetensors"):
        distill(student, teacher, batches(), steps=2, folder=tmp_path)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_student_comes_nearer_to_its_teacher(name: str) -> None:
    teacher = raised(name, layers=3)
    student = every_other_layer(teacher)
    losses: list[float] = []
    done = distill(
        student,
        teacher,
        batches(2),
        steps=60,
        lr=3e-3,
        hard_weight=0.0,
        soft_weight=1.0,
        on_step=lambda _, found: losses.append(found["soft"]),
    )
    assert losses[-1] < losses[0] / 2
    before, after, wanted = (run(p, texts())[0] for p in (student, done, teacher))
    assert float((after - wanted).norm()) < float((before - wanted).norm())
    assert teacher.weights.parameter_count() > done.weights.parameter_count()


def test_students_of_every_other_layer() -> None:
    teacher = raised("llama", layers=4)
    student = every_other_layer(teacher)
    assert not any(".1." in name or ".3." in name for name in student.weights)
    assert all(
        student.weights.entry(name) is teacher.weights.entry(name) for name in student.weights
    )
    every = every_other_layer(teacher, keep=[0, 1, 2, 3])
    assert torch.equal(*(run(p, texts())[0] for p in (teacher, every)))
    pairs = pairs_of_layers(student, teacher)
    assert len(pairs) == 3
    with pytest.raises(WrongInput, match="these layers cannot be kept"):
        every_other_layer(teacher, keep=[7])


def test_the_teacher_writes_the_text() -> None:
    teacher = raised("llama", layers=3)
    (written,) = teacher_sequences(teacher, [texts()], 4, 7)[0]
    assert torch.equal(written[:, :4], texts()[0][:, :4])
    for place in range(4, 7):
        logits = run(teacher, [written[:, :place]])[0]
        assert torch.equal(logits[:, -1].argmax(-1), written[:, place])
    done = distill(
        every_other_layer(teacher),
        teacher,
        batches(2),
        steps=2,
        sequence_level=(4, 7),
        soft_weight=0.0,
        hard_weight=1.0,
    )
    assert done.parameter_count() > 0


def test_the_public_names_are_functions() -> None:
    """No module is called as a public function is, so no import hides it."""
    assert planish.distill is distill
    assert planish.every_other_layer is every_other_layer
    assert importlib.util.find_spec("planish.distill") is None


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    """A few steps of it: what it says after all of them is in its own text."""
    found = runpy.run_path(str(ROOT / "examples" / "distill_a_student.py"))["main"](3, 2, 2)
    assert found["teacher"] != found["student, as cut"]
    assert "distillation brings back" in capsys.readouterr().out


def test_bad_options_are_told() -> None:
    program = raised("llama", layers=3)
    with pytest.raises(WrongOption, match="temperature"):
        distill(program, program, batches(), steps=1, temperature=0.0)
    with pytest.raises(WrongInput, match="nothing to distill on"):
        distill(program, program, [], steps=1)
    with pytest.raises(WrongInput, match="no weights that could be trained"):
        distill(program, program, batches(), steps=1, train="nothing.*")
    with pytest.raises(WrongInput, match="does not take the student's inputs"):
        distill(program, planish.trace(nn.Linear(5, 97), (torch.ones(2, 5),)), batches(), steps=1)
    narrow = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, 50))
    with pytest.raises(WrongInput, match="different classes"):
        distill(program, planish.trace(narrow, (texts()[0],)), batches(), steps=1)


def test_other_labels_are_another_training(tmp_path: Path) -> None:
    program = raised("llama", layers=3)
    options: dict[str, Any] = {"steps": 1, "folder": tmp_path}
    for shift in (1, 2):
        distill(
            program, program, batches(1), labels=lambda b, by=shift: b[0].roll(by, 1), **options
        )
    assert len(list(tmp_path.glob("*/state.safetensors"))) == 2
