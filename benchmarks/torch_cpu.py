"""Time the torch target: packed linears against F.linear, and a whole model against dense runs.

    python benchmarks/torch_cpu.py kernels --threads 1 --tokens 1 4 128
    python benchmarks/torch_cpu.py model FOLDER --bits 4 --lengths 1 512 --inductor

Everything compared is run in turn, round after round; medians are told. With one thread the
processor's own time is taken, which other processes do not lengthen. In `kernels`, `cold` walks
through copies of the dense and of the packed weight that do not fit the caches together, as the
layers of a model do.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from planish.codegen.torch_cpu import compile_program
from planish.ir.formats import AffineInt
from planish.kernels.linear_affine import pack
from planish.passes.pipeline import Pipeline
from planish.passes.quantize_weights import QuantizeWeights
from planish.sources import load_program

Call = Callable[[], object]
COLD_BYTES = 1 << 28


def interleaved(calls: dict[str, Call], rounds: int, repeats: int) -> dict[str, float]:
    """Median seconds of each call."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = clock()
            for _ in range(repeats):
                call()
            if turn:
                taken[name].append((clock() - start) / repeats)
    return {name: statistics.median(times) for name, times in taken.items()}


def told(name: str, medians: dict[str, float]) -> None:
    (base, first), *rest = medians.items()
    text = "  ".join(f"{n} {s * 1e6:.1f} us ({first / s:.2f}x)" for n, s in rest)
    load = os.getloadavg()[0]
    print(f"{name}: {base} {first * 1e6:.1f} us  {text}  load {load:.1f}", flush=True)


def kernels(options: argparse.Namespace) -> None:
    for shape in options.shapes:
        rows, length = map(int, shape.split("x"))
        weight = torch.randn(rows, length)
        for bits in options.bits:
            packed = pack(AffineInt(bits, options.group, not options.zero_points).encode(weight))
            for tokens in options.tokens:
                for cold in (False, True):
                    x = torch.randn(tokens, length)
                    count = max(2, COLD_BYTES // weight.nbytes) if cold else 1
                    dense = [weight.clone() for _ in range(count)]
                    parts = [
                        [None if p is None else p.clone() for p in (packed.codes, packed.scale,
                                                                    packed.zero)]
                        for _ in range(count)
                    ]  # fmt: skip
                    turns = {"dense": 0, "packed": 0}

                    def run_dense(x=x, dense=dense, turns=turns) -> object:
                        turns["dense"] += 1
                        return F.linear(x, dense[turns["dense"] % len(dense)])

                    def run_packed(x=x, parts=parts, turns=turns, packed=packed) -> object:
                        turns["packed"] += 1
                        codes, scale, zero = parts[turns["packed"] % len(parts)]
                        return torch.ops.planish.linear_affine(
                            x, codes, scale, zero, None, *packed.sizes
                        )

                    calls: dict[str, Call] = {"F.linear": run_dense, f"int{bits}": run_packed}
                    repeats = max(1, min(100, int(4e7 / (tokens * rows * length))))
                    name = f"{shape} int{bits} M={tokens} {'cold' if cold else 'hot'}"
                    told(name, interleaved(calls, options.rounds, repeats))


def model(options: argparse.Namespace) -> None:
    program = load_program(Path(options.folder), (), {})
    step = QuantizeWeights(bits=options.bits[0], group_size=32, embeddings="int8-g32-sym-f32")
    small = Pipeline([step], verify="structure").run(program)
    runs = {
        "dense eager": compile_program(program, "eager"),
        "packed eager": compile_program(small, "eager"),
    }
    if options.inductor:
        for name, made in (("dense Inductor", program), ("packed Inductor", small)):
            start = time.perf_counter()
            runs[name] = compile_program(made)
            print(f"{name}: compiled in {time.perf_counter() - start:.0f} s", flush=True)
    for length in options.lengths:
        ids = torch.randint(0, 1000, (1, length))
        flat = [ids, torch.ones_like(ids)][: len(program.inputs)]
        calls = {name: (lambda run=run, flat=flat: run(*flat)) for name, run in runs.items()}
        told(f"{length} tokens", interleaved(calls, options.rounds, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    kinds = parser.add_subparsers(required=True)
    for run in (kernels, model):
        kind = kinds.add_parser(run.__name__)
        kind.set_defaults(run=run)
        kind.add_argument("--threads", type=int, default=1)
        kind.add_argument("--rounds", type=int, default=15 if run is kernels else 5)
        kind.add_argument("--bits", type=int, nargs="+", default=[8, 4] if run is kernels else [4])
        if run is model:
            kind.add_argument("folder", help="a model folder or a saved program")
            kind.add_argument("--lengths", type=int, nargs="+", default=[1, 512])
            kind.add_argument("--inductor", action="store_true")
        else:
            kind.add_argument("--group", type=int, default=32)
            kind.add_argument("--zero-points", action="store_true")
            kind.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 8, 128])
            shapes = ["1536x576", "576x1536", "49152x576"]
            kind.add_argument("--shapes", nargs="+", default=shapes, help="NxK")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    options.run(options)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
