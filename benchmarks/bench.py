"""planish against its peers: one protocol for all, one run, separate processes, turn by turn.

    make bench          planish, eager, Inductor, onnxruntime
    make bench-peers    with llama.cpp, ONNX Runtime GenAI, OpenVINO, NNCF, torchao, bitsandbytes
    python benchmarks/bench.py --models smollm2 --threads 2 --only eager "planish int4" llama.cpp

Results go to benchmarks/results/: JSON lines of every sample, Markdown tables, PNG pictures. A run
that was broken off goes on when it is started again; --fresh begins anew. What contestants load is
kept in planish's cache and made again when planish or an engine changed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import torch
from bench_models import REAL, SCALE, TINY, find_model, text_of
from pass_growth import measure_growth
from planish.bench_measures import MEASURES, QUICK
from planish.bench_picture import draw
from planish.bench_process import Interpreters
from planish.bench_results import Results
from planish.bench_roster import Contestant, contestants
from planish.bench_run import Plan, run
from planish.bench_table import markdown
from planish.codegen.bundle import planish_version
from planish.ir.read_gguf import cache_folder
from targets import targets_markdown

_HERE = Path(__file__).parent
_PACKAGES = ("torch", "transformers", "onnxruntime", "numpy")


def machine() -> str:
    """In words, without names of hosts."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), "?")
    flags = next((line for line in lines if line.startswith("flags")), "")
    wide = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if f in flags]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores of {name} ({', '.join(wide)}), {memory:.0f} GiB, {platform.system()}"


def chosen(rows: list[Contestant], only: list[str]) -> list[Contestant]:
    """The baseline, and those whose name has one of the parts; all if there are none."""
    first, *others = rows
    return [first, *(row for row in others if not only or named(row.name, only))]


def named(name: str, parts: list[str]) -> bool:
    """Whether one of the parts is in the name."""
    return any(part in name for part in parts)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*REAL, *SCALE, *TINY]
    parser.add_argument("--models", nargs="+", choices=names, default=None)
    parser.add_argument("--scale", action="store_true", help="also the random 0.5 and 1.1 B models")
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[], help="parts of contestants' names")
    parser.add_argument("--measures", nargs="+", default=[], help="parts of measures' names")
    parser.add_argument("--slices", type=int, default=8, help="of 512 tokens, for quality")
    parser.add_argument("--peers", help="the Python of the peers' environment")
    parser.add_argument("--out", type=Path, default=_HERE / "results")
    parser.add_argument("--name", default="bench", help="of the result files")
    parser.add_argument("--place", type=Path, default=cache_folder() / "bench" / "contestants")
    parser.add_argument(
        "--quick", action="store_true", help="2 rounds of small sizes: a smoke test"
    )
    parser.add_argument("--fresh", action="store_true", help="forget the results so far")
    parser.add_argument(
        "--report", action="store_true", help="only write tables and pictures again"
    )
    parser.add_argument("--no-growth", action="store_true", help="leave out the time of the passes")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    file = given.out / f"{given.name}.jsonl"
    if given.fresh:
        file.unlink(missing_ok=True)
    results = Results(file)
    if not given.report:
        measure_all(given, results)
    text = markdown(results) + "\n" + targets_markdown(results)
    (given.out / f"{given.name}.md").write_text(text)
    print(text)
    pictures = given.out / given.name
    pictures.mkdir(exist_ok=True)
    for picture in draw(results, pictures):
        print(picture, file=sys.stderr)


def measure_all(given: argparse.Namespace, results: Results) -> None:
    begun = time.monotonic()

    def tell(what: str) -> None:
        print(f"[{time.monotonic() - begun:6.0f} s] {what}", file=sys.stderr, flush=True)

    models = given.models or [*(TINY if given.quick else REAL), *(SCALE if given.scale else ())]
    rounds, slices, length = (2, 1, 64) if given.quick else (given.rounds, given.slices, 512)
    texts: list[str] = []
    for name in models:
        model = find_model(name, given.place)
        text = text_of(model, given.place, slices, length)
        texts.append(f"{name}: {text.source}")
        everyone = contestants(model.kind, _HERE / "contestants" if given.peers else None)
        known = [m for m in (QUICK if given.quick else MEASURES) if m.kind == model.kind]
        wanted = [m for m in known if not given.measures or named(m.name, given.measures)]
        pythons = Interpreters(sys.executable, given.peers)
        rows = chosen(everyone, given.only)
        threads = given.threads[:1] if name in SCALE else given.threads
        run(Plan(model, rows, wanted, text, given.place, threads, rounds, pythons), results, tell)
    if not given.no_growth:
        measure_growth(results, (2, 4) if given.quick else (12, 24, 48, 96), tell)
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    told = {"planish": planish_version(), "python": platform.python_version(), **versions}
    command = shlex.join(["python", *sys.argv])
    results.add("run", command=command, versions=told, machine=machine(), text="; ".join(texts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
