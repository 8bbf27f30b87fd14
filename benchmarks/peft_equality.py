"""Adapters merged by planish against PEFT's own merge_and_unload, one of each kind, as a table.

    python benchmarks/peft_equality.py [--only LoRA DoRA] [--out benchmarks/results]

Tiny public architectures with random weights (tests/zoo.py) and random adapters
(tests/peft_adapters.py), float32. Columns: weights compared, those that the adapter changed, the
largest gap of a weight in units of eps * max|W| of that weight; then outputs for other inputs than
the captured ones, in units of eps * max|output|: planish's merged program against PEFT's merged
model, and beside it PEFT's merged model against PEFT's model before the merge.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from planish.passes.merge_adapters import MergeAdapters
from planish.passes.pipeline import Pipeline
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from peft_adapters import CASES, base, captured_base, trained, weights_gap

HEADER = "| kind | model | weights | changed | largest gap | outputs | PEFT's own merge |"


def row(kind: str) -> str:
    name, config = CASES[kind]
    before, inputs = captured_base(name), base(name).inputs
    with tempfile.TemporaryDirectory() as folder:
        adapted = trained(name, config(), Path(folder))
        apart = output_of(adapted, inputs)
        theirs = adapted.merge_and_unload()
        merged = Pipeline([MergeAdapters(adapters=folder)]).run(before)
    gap = weights_gap(before, merged, theirs.state_dict())
    wanted = output_of(theirs, inputs)
    found = first(merged(**inputs))
    real = inputs["attention_mask"].bool() if wanted.dim() == 3 else slice(None)
    ours, own = (units(value[real], wanted[real]) for value in (found, apart))
    return (
        f"| {kind} | {name} | {gap.compared} | {gap.changed} "
        f"| {gap.units:.2f} | {ours:.1f} | {own:.1f} |"
    )


def output_of(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return first(model.eval()(**inputs))


def first(output: Any) -> Tensor:
    """The logits; of an encoder what it pools, or else its last hidden states."""
    names = ("logits", "pooler_output", "last_hidden_state")
    return next(output[name] for name in names if output.get(name) is not None)


def units(found: Tensor, wanted: Tensor) -> float:
    gap = (found.double() - wanted.double()).abs().max()
    return float(gap / (torch.finfo(wanted.dtype).eps * wanted.double().abs().max()))


def table(kinds: list[str]) -> str:
    lines = [HEADER, "|---|---|---:|---:|---:|---:|---:|"]
    for kind in kinds:
        lines.append(row(kind))
        print(lines[-1], flush=True)
    versions = ", ".join(f"{name} {version(name)}" for name in ("peft", "transformers", "torch"))
    return "\n".join([*lines, "", f"float32, {versions}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(CASES), metavar="KIND")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    text = table(options.only or list(CASES))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "peft_equality.md"
    path.write_text(text, encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
