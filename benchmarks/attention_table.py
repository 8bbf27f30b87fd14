"""Print what the raising of attention and rotary embeddings makes of the public architectures.

    python benchmarks/attention_table.py [--only llama t5] [--unpadded]

Tiny models with random weights (tests/zoo.py), captured in both spellings of attention, raised, and
run before and after on two shapes (`verify="numbers"`). Columns: attentions raised of those that
the model has; what each was recognized as; rotary embeddings raised; values with both axes, queries
and keys, of free length, that are left in the graph outside of the operation ("squares").
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from planish.ir.edit import shape
from planish.ir.history import PassRecord
from planish.ir.pattern import bound_arguments
from planish.ir.positional import free_symbols
from planish.ir.program import Node, Program
from planish.passes.canonicalize import Canonicalize
from planish.passes.drop_dead import DropDead
from planish.passes.pipeline import Pipeline
from planish.passes.raise_attention import RaiseAttention
from planish.passes.raise_rotary import RaiseRotary

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import captured
import zoo

ATTENTION = torch.ops.planish.attention.default
WIDTHS = (12, 6, 7, 62, 7, 8)


def program_of(name: str, form: zoo.Attention, unpadded: bool) -> tuple[Program, list[list[Any]]]:
    """The captured program and inputs of two shapes."""
    sample = captured.sample(name, form)
    both = [dict(sample.kwargs), sample.other_inputs()]
    if unpadded and "attention_mask" in both[0]:
        for inputs in both:
            del inputs["attention_mask"]
        program = captured.capture_module(sample.model, (), both[0])
    else:
        program = captured.captured(name, form)
    return program, [program.flatten_inputs((), inputs) for inputs in both]


def kind(node: Node) -> str:
    """What one attention is, in a few words."""
    a = bound_arguments(node)
    heads, groups = shape(a["q"])[1], shape(a["k"])[1]
    words = ["causal"] if a["causal"] else []
    words += [f"window {a['window']}"] if a["window"] else []
    words += [f"{heads}/{groups} heads"] if heads != groups else []
    words += [f"cap {a['softcap']:g}"] if a["softcap"] else []
    words += ["sinks"] if a["sinks"] is not None else []
    words += ["values " + str(shape(a["v"])[3])] if shape(a["v"])[3] != shape(a["q"])[3] else []
    if a["mask"] is not None:
        square = "" if shape(a["mask"])[-2] == 1 else " of scores"
        boolean = a["mask"].meta["val"].dtype == torch.bool
        words.append(
            ("padding" if boolean and not square else "mask" if boolean else "bias") + square
        )
    cross = str(shape(a["q"])[2]) != str(shape(a["k"])[2])
    return " + ".join([*words, *(["cross"] if cross else [])]) or "all to all"


def lengths(program: Program) -> set[str]:
    """The numbers of queries and keys, as expressions, of a raised program."""
    calls = [node for node in program.graph.nodes if node.target is ATTENTION]
    return {str(shape(source)[2]) for node in calls for source in node.args[:2]}


def squares(program: Program, lengths: set[str]) -> int:
    """How many values have queries and keys of free length as their last two axes."""
    count = 0
    for node in program.graph.nodes:
        value = node.meta.get("val")
        sizes = value.shape[-2:] if isinstance(value, torch.Tensor) else ()
        count += len(sizes) == 2 and all(free_symbols(s) and str(s) in lengths for s in sizes)
    return count


def row(name: str, form: zoo.Attention, unpadded: bool) -> tuple[str, ...]:
    program, probes = program_of(name, form, unpadded)
    steps = [Canonicalize(), DropDead(), RaiseAttention(), RaiseRotary(), DropDead()]
    after = Pipeline(steps, verify="numbers", on_break="raise").run(program, probes=probes)
    records: dict[str, PassRecord] = {record.name: record for record in after.history}
    attention, rotary = records["raise_attention"], records["raise_rotary"]
    kinds = Counter(kind(node) for node in after.graph.nodes if node.target is ATTENTION)
    told = "; ".join(f"{count} {what}" for what, count in kinds.items())
    return (
        name,
        form,
        ratio(attention),
        told,
        ratio(rotary),
        f"{squares(program, lengths(after))} > {squares(after, lengths(after))}",
    )


def ratio(record: PassRecord) -> str:
    count = len(record.applied)
    return f"{count}/{count + len(record.declined)}"


def line(cells: tuple[str, ...]) -> str:
    *others, last = [cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)]
    return " ".join([*others, last.rstrip()])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="architectures; default: all")
    parser.add_argument("--unpadded", action="store_true", help="capture without attention_mask")
    options = parser.parse_args()
    print(line(("model", "form", "raised", "recognized as", "rotary", "squares")))
    for name, form in zoo.CASES:
        if not options.only or name in options.only:
            print(line(row(name, form, options.unpadded)), flush=True)


if __name__ == "__main__":
    main()
