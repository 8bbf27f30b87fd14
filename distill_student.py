"""A student made of its teacher's layers, and which layers of both belong together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .ir.edit import Editor
from .ir.errors import WrongInput
from .ir.interpret import run
from .ir.program import Node, Program
from .passes.keep_layers import CannotCutLayers, layer_ends

_ATTENTION = torch.ops.planish.attention.default


def ends_of_layers(program: Program) -> list[Node]:
    """The value before the first layer and the one after each; raises CannotCutLayers."""
    attentions = [node for node in program.graph.nodes if node.target is _ATTENTION]
    if len(attentions) < 2:
        raise CannotCutLayers(
            f"{len(attentions)} layers were found",
            expected="two or more, each with one planish.attention",
            fix="raise the program first: planish.optimize(model, recipe='raise').program",
        )
    return layer_ends(program, attentions)


def every_other_layer(teacher: Program, keep: Sequence[int] | None = None) -> Program:
    """A student of some of the teacher's layers, with their weights: DistilBERT's first weights.

    teacher: raised, without a KV cache. keep: layers counted from 0; by default 0, 2, 4, ...
    (Sanh et al. 2019, "DistilBERT", sec. 3: one layer out of two). Raises CannotCutLayers and
    WrongInput.
    """
    ends = ends_of_layers(teacher)
    count = len(ends) - 1
    kept = set(range(0, count, 2)) if keep is None else set(keep)
    if not kept or not kept <= set(range(count)) or "cached" in teacher.facts:
        raise WrongInput(
            "these layers cannot be kept",
            expected=f"one or more of 0 to {count - 1}, of a program without a KV cache",
            found=f"{sorted(kept)}{', cached' if 'cached' in teacher.facts else ''}",
            fix="choose other layers, or make the student before insert_kv_cache",
        )
    student = teacher.copy()
    ends = ends_of_layers(student)
    for layer in reversed(range(count)):
        if layer not in kept:
            ends[layer + 1].replace_all_uses_with(ends[layer])
    Editor(student).sweep()
    return student


def pairs_of_layers(student: Program, teacher: Program) -> list[tuple[Node, Node]]:
    """Layer ends of the student, each with the teacher's that is as deep, in parts of the whole."""
    small, large = ends_of_layers(student), ends_of_layers(teacher)
    deep = (len(large) - 1) / (len(small) - 1)
    return [(end, large[round(number * deep)]) for number, end in enumerate(small)]


@torch.no_grad()
def teacher_sequences(
    teacher: Program,
    batches: Sequence[Sequence[Tensor]],
    prompt: int,
    length: int,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[list[Tensor]]:
    """Texts as the teacher goes on after the first `prompt` tokens of each batch, greedily.

    batches: token ids alone, int64 [rows, at least prompt]. Returns ids [rows, length]. Training on
    them is sequence-level distillation with a beam of one (Kim & Rush 2016, sec. 3.2). Raises
    WrongInput.
    """
    found: list[list[Tensor]] = []
    for number, batch in enumerate(batches):
        progress(number, len(batches), "the teacher writes")
        ids = batch[0] if len(batch) == 1 else None
        fine = isinstance(ids, Tensor) and ids.dtype == torch.int64 and ids.dim() == 2
        if ids is None or not fine or not 0 < prompt <= ids.shape[1] or prompt >= length:
            raise WrongInput(
                "the teacher cannot go on from this batch",
                expected=f"token ids alone, int64 [rows, {prompt} or more], and length > prompt",
                found=f"{len(batch)} inputs, prompt {prompt}, length {length}",
                fix="trace both models with (ids,), and give the prompts as token ids",
            )
        ids = ids[:, :prompt]
        while ids.shape[1] < length:
            following = run(teacher, [ids])[0][:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, following], 1)
        found.append([ids])
    return found


__all__ = ["ends_of_layers", "every_other_layer", "pairs_of_layers", "teacher_sequences"]
