"""Distill a small student on a CPU: half the teacher's layers, and how much of its loss comes back.

Run it with `python examples/distill_a_student.py`; it takes a minute. The teacher is a tiny Llama
that learns the letters of Python's own documentation here, on its first nine tenths; losses are on
a part of the last tenth, in nats a letter, which no model has seen. To show what the teacher's
probabilities are worth, another student of the same start gets the same steps on the text alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pydoc_data import topics

import planish
import torch
import transformers
from planish import Program, distill, every_other_layer
from planish.distill_losses import hard_loss, next_tokens
from planish.ir.interpret import run
from torch import Tensor

LENGTH, ROWS = 64, 16


def letters() -> tuple[list[Tensor], list[Tensor]]:
    """Letters as their codes: batches [rows, length] to learn from, and to measure on."""
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    ids = torch.tensor(list(text.encode("ascii", "replace")))
    whole = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    kept = len(whole) - max(1, len(whole) // 10)
    order = torch.randperm(kept, generator=torch.Generator().manual_seed(0))
    return list(whole[order].split(ROWS)), list(whole[kept:].split(ROWS))


def untrained_teacher() -> Program:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.zeros(2, LENGTH, dtype=torch.int64)
    captured = planish.trace(model, (), {"input_ids": ids})
    return planish.optimize(captured, recipe="raise").program


def loss(program: Program, texts: Sequence[Tensor]) -> float:
    labels = next_tokens(program)
    found = [hard_loss(run(program, [ids])[0], labels([ids])) for ids in texts]
    return float(torch.stack(found).mean())


def main(teaching: int = 1500, steps: int = 500, measured: int = 40) -> Mapping[str, float]:
    """Print and return the held-out losses."""
    learn, measure = letters()
    batches = [{"input_ids": ids} for ids in learn]
    start = untrained_teacher()
    # A program learns from text alone where only the hard targets count.
    learned = partial(distill, batches=batches, hard_weight=1.0, soft_weight=0.0)
    teacher = learned(start, start, steps=teaching, lr=3e-3)
    student = every_other_layer(teacher)
    text_only = learned(student, teacher, steps=steps, lr=1e-3)
    distilled = distill(student, teacher, batches, steps=steps, lr=1e-3, hidden_weight=0.1)
    programs = {
        "teacher": teacher,
        "student, as cut": student,
        "student, text alone": text_only,
        "student, distilled": distilled,
    }
    losses = {name: loss(program, measure[:measured]) for name, program in programs.items()}
    for name, program in programs.items():
        print(f"{name:20} {program.parameter_count():>8,} parameters  loss {losses[name]:.3f}")
    lost = losses["student, as cut"] - losses["teacher"]
    back = losses["student, as cut"] - losses["student, distilled"]
    print(f"distillation brings back {back / lost:.0%} of what the cut lost")
    return losses


if __name__ == "__main__":
    main()
