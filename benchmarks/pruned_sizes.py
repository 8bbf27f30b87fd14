"""Parameters before and after structured cuts of the public architectures, and what they change.

    python benchmarks/pruned_sizes.py [--only llama t5]

Tiny models with random weights (tests/zoo.py). Of every place each third unit of a kind goes. Each
cell has the number of parameters that are left, and in parentheses the largest difference of the
results, in float64 and by the largest result, from the uncut program with those weights set to 0.
Norms of a residual stream that is cut get a factor; weights are float64 here, so it is not rounded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from planish.ir.channel_map import channel_map
from planish.ir.cut_channels import CannotCut, cut_channels, masked
from planish.ir.find_units import find_units
from planish.ir.program import Program
from planish.ir.prunable_units import Kind

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import captured
import cut_checks
import zoo
from planish.recipes import pipeline

KINDS: tuple[Kind, ...] = ("ffn", "heads", "queries", "width")


def cell(program: Program, kind: Kind) -> str:
    channels = channel_map(program)
    dead = cut_checks.every_third(find_units(program, channels, [kind]))
    if not dead:
        return "none may go"
    try:
        made = cut_channels(program.copy(), dead, channels=channels)
    except CannotCut as error:
        return f"refused: {error.found}"
    gap = cut_checks.gap(masked(program, channels, dead), made)
    return f"{made.parameter_count():,} ({gap:.0e})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(zoo.ARCHITECTURES))
    options = parser.parse_args()
    print(f"| architecture | whole | {' | '.join(KINDS)} |")
    print(f"|---|---|{'---|' * len(KINDS)}")
    for name in options.only:
        form = zoo.ARCHITECTURES[name].attentions[0]
        program = pipeline("raise").run(captured.captured(name, form))
        wide = cut_checks.doubled(program)
        cells = [cell(wide, kind) for kind in KINDS]
        print(f"| {name} | {program.parameter_count():,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
