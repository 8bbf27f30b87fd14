"""Distillation: train a captured program until it computes what a larger one computes.

    student = every_other_layer(teacher)
    student = distill(student, teacher, batches, steps=200, lr=1e-3)

Both are programs; no model code is needed. The loss is a weighted sum of Hinton's soft and hard
targets (Hinton et al. 2015, sec. 2) and of the distance of hidden states, layer by layer (Romero
et al. 2015; Jiao et al. 2020, "TinyBERT", eq. 8). AdamW (Loshchilov & Hutter 2019). A training
that is interrupted and goes on from its folder gives the same bits as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .calibration import calibration_batches
from .distill_losses import Labels, hard_loss, hidden_loss, next_tokens, seen_places, soft_loss
from .distill_state import TrainingState, training_state
from .distill_student import ends_of_layers, pairs_of_layers, teacher_sequences
from .ir.errors import WrongInput, WrongOption
from .ir.interpret import run
from .ir.program import Node, Program
from .trainable import Trainable, trained_weights

_LEAST_RATE, _WARM, _LARGEST = 0.1, 0.05, 1.0
"""The rate at the end, the share of steps in which it rises, and the gradient's largest norm."""


@dataclass(frozen=True)
class Settings:
    """How a student is trained; see `distill`."""

    steps: int
    lr: float
    temperature: float
    hard_weight: float
    soft_weight: float
    hidden_weight: float
    weight_decay: float
    seed: int
    train: str

    def __post_init__(self) -> None:
        weights = (self.hard_weight, self.soft_weight, self.hidden_weight)
        for name, fine, expected in (
            ("steps", self.steps >= 1, "1 or more"),
            ("lr", self.lr > 0, "more than 0"),
            ("temperature", self.temperature > 0, "more than 0"),
            ("hard_weight", min(weights) >= 0 < sum(weights), "weights of 0 or more, one above 0"),
        ):
            if not fine:
                raise WrongOption(
                    f"distill cannot have {name}={getattr(self, name)!r}",
                    expected=expected,
                    found=repr(getattr(self, name)),
                    fix="leave it out for the default",
                )


def distill(
    student: Program,
    teacher: Program,
    batches: Sequence[Any],
    *,
    steps: int,
    lr: float = 1e-4,
    temperature: float = 2.0,
    hard_weight: float = 0.5,
    soft_weight: float = 0.5,
    hidden_weight: float = 0.0,
    labels: Labels | None = None,
    sequence_level: tuple[int, int] | None = None,
    weight_decay: float = 0.01,
    train: str = "*",
    checkpointing: bool = False,
    folder: str | Path | None = None,
    save_every: int = 50,
    seed: int = 0,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    on_step: Callable[[int, Mapping[str, float]], None] = lambda step, losses: None,
) -> Program:
    """A copy of the student, trained on batches; one batch a step, in a new order each round.

    student, teacher: take the same inputs; their first result is logits [..., classes]. batches: as
    for calibration. labels: hard targets, by default the next tokens. hidden_weight: of the
    distance between layers that are as deep (both programs raised); of another width, they are
    compared through a matrix that is learned and thrown away. sequence_level: (prompt, length):
    train on the teacher's own continuations instead of the batches. train: patterns of weights.
    checkpointing: compute layers again in the backward pass instead of keeping their values.
    folder: keeps the state each `save_every` steps, and goes on from it. on_step: gets each step's
    losses. Raises WrongInput, WrongOption, CannotCutLayers, CorruptFile.
    """
    chosen = Settings(
        steps, lr, temperature, hard_weight, soft_weight, hidden_weight, weight_decay, seed, train
    )
    flat: Sequence[Sequence[Any]] = calibration_batches(student, batches)
    if not flat:
        raise WrongInput("there is nothing to distill on", expected="batches", found="none")
    _check_alike(student, teacher, chosen)
    told = [] if labels is None or not hard_weight else [labels(batch) for batch in flat]
    options = f"{astuple(chosen)} {sequence_level}"
    state = training_state(folder, (student, teacher), [*flat, told], options)
    if sequence_level is not None:
        flat = teacher_sequences(teacher, flat, *sequence_level, progress=progress)
    work = _Training(student, teacher, chosen, labels, checkpointing)
    return work.run(flat, state, save_every, progress, on_step)


def _check_alike(student: Program, teacher: Program, chosen: Settings) -> None:
    """Raise WrongInput unless the teacher takes what the student takes and knows its classes."""
    taken = [
        [(i.dtype, i.shape and len(i.shape)) for i in p.input_specs] for p in (student, teacher)
    ]
    if taken[0] != taken[1]:
        raise WrongInput(
            "the teacher does not take the student's inputs",
            expected=", ".join(spec.name for spec in student.input_specs),
            found=", ".join(spec.name for spec in teacher.input_specs),
            fix="trace both with the same arguments",
        )
    own, other = (p.results[0].meta["val"].shape for p in (student, teacher))
    if chosen.soft_weight and (len(own) != len(other) or own[-1] != other[-1]):
        raise WrongInput(
            "student and teacher tell different classes apart",
            expected=f"logits [..., {own[-1]}] from both as their first result",
            found=f"{list(other)} from the teacher",
            fix="soft_weight=0, or programs with one vocabulary whose first result is logits",
        )


class _Training:
    def __init__(
        self,
        student: Program,
        teacher: Program,
        settings: Settings,
        labels: Labels | None,
        checkpointing: bool,
    ) -> None:
        self.settings, self.teacher = settings, teacher
        self.labels = labels or next_tokens(student)
        stops = ends_of_layers(student) if checkpointing else None
        names = trained_weights(student, settings.train)
        self.student = Trainable(student, names, stops)
        self.pairs = pairs_of_layers(student, teacher) if settings.hidden_weight else []
        self.bridges = _bridges(self.pairs, settings.seed)
        self.parameters = {
            **{f"weight.{name}": value for name, value in self.student.parameters.items()},
            **{f"bridge.{number}": value for number, value in self.bridges.items()},
        }
        matrices = [value for value in self.parameters.values() if value.dim() > 1]
        others = [value for value in self.parameters.values() if value.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr)
        self._teachers_weights: dict[str, Tensor] = {}

    def run(
        self,
        batches: Sequence[Sequence[Any]],
        state: TrainingState,
        save_every: int,
        progress: Callable[[int, int, str], None],
        on_step: Callable[[int, Mapping[str, float]], None],
    ) -> Program:
        total = self.settings.steps
        start = state.load(self.parameters, self.optimizer)
        for step in range(start, total):
            losses = self._step(step, batches[_place(step, len(batches), self.settings.seed)])
            told = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
            done = step + 1
            if done % save_every == 0 or done == total:
                state.save(done, self.parameters, self.optimizer)
            on_step(done, losses)
            progress(done, total, told)
        return self.student.trained()

    def _step(self, step: int, flat: Sequence[Any]) -> dict[str, float]:
        with torch.enable_grad():
            terms = self._losses(flat)
            loss = torch.stack([weight * term for weight, term in terms.values()]).sum()
        if not bool(loss.isfinite()):
            raise WrongInput(
                f"the loss of step {step + 1} is not a number",
                found=", ".join(f"{n} {float(t.detach()):g}" for n, (_, t) in terms.items()),
                fix="lower lr, and check the batches",
            )
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), _LARGEST)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * _rate(step, self.settings.steps)
        self.optimizer.step()
        found = {name: float(term.detach()) for name, (_, term) in terms.items()}
        return {"loss": float(loss.detach()), **found}

    def _losses(self, flat: Sequence[Any]) -> dict[str, tuple[float, Tensor]]:
        chosen = self.settings
        terms: dict[str, tuple[float, Tensor]] = {}
        logits, states = self.student(flat, [end for end, _ in self.pairs])
        seen = seen_places(self.student.program, flat, logits)
        if chosen.hard_weight:
            terms["hard"] = chosen.hard_weight, hard_loss(logits, self.labels(flat))
        if not chosen.soft_weight and not self.pairs:
            return terms
        wanted, hidden = self._teach(flat)
        if chosen.soft_weight:
            loss = soft_loss(logits, wanted, chosen.temperature, seen)
            terms["soft"] = chosen.soft_weight, loss
        if self.pairs:
            apart: list[Tensor] = []
            for number, (_, end) in enumerate(self.pairs):
                own = states[number]
                if number in self.bridges:
                    own = own.float() @ self.bridges[number]
                apart.append(hidden_loss(own, hidden[end], seen))
            terms["hidden"] = chosen.hidden_weight, torch.stack(apart).mean()
        return terms

    def _teach(self, flat: Sequence[Any]) -> tuple[Tensor, dict[Node, Tensor]]:
        wanted, hidden = {end for _, end in self.pairs}, dict[Node, Tensor]()

        def watch(node: Node, value: Any) -> None:
            if node in wanted:
                hidden[node] = value

        def weight(name: str) -> Tensor:
            if name not in self._teachers_weights:
                self._teachers_weights[name] = self.teacher.weights[name].detach()
            return self._teachers_weights[name]

        return run(self.teacher, flat, watch=watch, weight=weight)[0], hidden


def _bridges(pairs: Sequence[tuple[Node, Node]], seed: int) -> dict[int, Tensor]:
    """For pairs of unlike widths a matrix [student's, teacher's]."""
    made: dict[int, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    for number, (own, other) in enumerate(pairs):
        width, wanted = (int(end.meta["val"].shape[-1]) for end in (own, other))
        if width != wanted:
            start = torch.randn(width, wanted, generator=generator) / math.sqrt(width)
            made[number] = start.requires_grad_()
    return made


def _place(step: int, count: int, seed: int) -> int:
    """Which batch a step takes: each once in a round, in an order of the round's own."""
    rounds, place = divmod(step, count)
    generator = torch.Generator().manual_seed(seed + rounds)
    return int(torch.randperm(count, generator=generator)[place])


def _rate(step: int, steps: int) -> float:
    """The learning rate as a part of the highest: a short rise, then a half cosine."""
    rise = max(1, round(_WARM * steps))
    if step < rise:
        return (step + 1) / rise
    fallen = (step - rise) / max(1, steps - rise)
    return _LEAST_RATE + (1 - _LEAST_RATE) * (1 + math.cos(math.pi * fallen)) / 2


__all__ = ["Settings", "distill"]
