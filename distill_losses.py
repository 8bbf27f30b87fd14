"""What a student is told to be like: the text, the teacher's probabilities, its hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .ir.errors import WrongInput
from .ir.program import Program

Labels = Callable[[Sequence[Any]], Tensor]
"""The right classes of one batch of flat inputs: int64 of the logits' leading shape, -100: none."""
IGNORED = -100


def soft_loss(student: Tensor, teacher: Tensor, temperature: float, seen: Tensor | None) -> Tensor:
    """T^2 times the mean divergence of the student's softmax(logits / T) from the teacher's.

    logits: [..., classes]; seen: bool [...], where to look. T^2 keeps the gradient's size when T
    changes (Hinton et al. 2015, sec. 2); the teacher's entropy, a constant, is left out.
    """
    wanted = (teacher.float() / temperature).log_softmax(-1)
    found = (student.float() / temperature).log_softmax(-1)
    apart = functional.kl_div(found, wanted, log_target=True, reduction="none").sum(-1)
    return temperature**2 * (apart if seen is None else apart[seen]).mean()


def hard_loss(student: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of logits [..., classes] with int64 [...]; IGNORED counts for nothing."""
    flat = student.float().flatten(0, -2)
    return functional.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED)


def hidden_loss(student: Tensor, teacher: Tensor, seen: Tensor | None) -> Tensor:
    """The mean squared difference of hidden states [..., width], of the teacher's mean square."""
    if seen is not None and seen.shape == student.shape[:-1]:
        student, teacher = student[seen], teacher[seen]
    wanted = teacher.float()
    return functional.mse_loss(student.float(), wanted) / wanted.square().mean().clamp_min(1e-12)


def seen_places(program: Program, flat: Sequence[Any], logits: Tensor) -> Tensor | None:
    """Where an attention mask of the logits' leading shape is not zero; None: everywhere."""
    for spec, value in zip(program.input_specs, flat, strict=True):
        if spec.name == "attention_mask" and isinstance(value, Tensor):
            return value.bool() if value.shape == logits.shape[:-1] else None
    return None


def next_tokens(program: Program) -> Labels:
    """Labels of a language model: each place's next token. Raises WrongInput for other models."""
    specs = program.input_specs
    place = next((i for i, spec in enumerate(specs) if spec.name == "input_ids"), 0)

    def labels(flat: Sequence[Any]) -> Tensor:
        ids = flat[place]
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.dim() != 2:
            raise WrongInput(
                "there are no hard targets for this model",
                expected="token ids int64 [batch, length], or labels=",
                found=specs[place].name,
                fix="pass labels=, a function from flat inputs to classes, or hard_weight=0",
            )
        wanted = torch.full_like(ids, IGNORED)
        wanted[:, :-1] = ids[:, 1:]
        seen = seen_places(program, flat, ids.unsqueeze(-1))
        if seen is not None:
            wanted[:, :-1][~seen[:, 1:]] = IGNORED
        return wanted

    return labels


__all__ = [
    "IGNORED",
    "Labels",
    "hard_loss",
    "hidden_loss",
    "next_tokens",
    "seen_places",
    "soft_loss",
]
