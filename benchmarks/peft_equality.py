"""Adapters merged by planish against PEFT's own merge_and_unload, one of each kind, as a table.

    python benchmarks/peft_equality.py [--only LoRA DoRA] [--out benchmarks/results]

Tiny public architectures with random weights (tests/zoo.py) and random adapters
(tests/peft_adapters.py), float32. Columns: weights compared, those that the adapter changed, the
largest difference of a weight in units of eps * max|W| of that weight; then logits of other inputs
than the captured ones, in units of eps * max|logits|: planish's merged program against PEFT's
merged model, and beside it PEFT's merged model against PEFT's model before the merge.
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

import captured
from peft_adapters import CASES, trained, weights_gap

HEADER = (
    "| kind | model | weights | changed | largest gap, eps max\\|W\\| | logits | PEFT's own merge |"
)


def row(kind: str) -> str:
    name, config = CASES[kind]
    base = captured.captured(name, "eager")
    inputs = captured.sample(name, "eager").other_inputs()
    with tempfile.TemporaryDirectory() as folder:
        adapted = trained(name, config(), Path(folder))
        apart = logits(adapted, inputs)
        theirs = adapted.merge_and_unload()
        merged = Pipeline([MergeAdapters(adapters=folder)]).run(base)
    gap = weights_gap(base, merged, theirs.state_dict())
    wanted = logits(theirs, inputs)
    found = first(merged(**inputs))
    kept = inputs["attention_mask"].bool()
    ours, own = (units(value[kept], wanted[kept]) for value in (found, apart))
    return (
        f"| {kind} | {name} | {gap.compared} | {gap.changed} "
        f"| {gap.units:.2f} | {ours:.1f} | {own:.1f} |"
    )


def logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return first(model.eval()(**inputs))


def first(output: Any) -> Tensor:
    """The logits, or an encoder's last hidden states."""
    return output["logits"] if "logits" in output else output["last_hidden_state"]


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
