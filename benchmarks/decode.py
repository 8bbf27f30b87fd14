"""Decoding and prefill against the peers: one run, interleaved, each engine in its own process.

python benchmarks/decode.py --threads 2 --repeats 5 [--peers PYTHON] [--only NAME ...]

PYTHON is the interpreter of an environment with onnxruntime-genai and llama-cpp-python. Times are
medians; tokens/s by the wall and by the process's CPU time; ratios are to eager in the same run.
Quality is measured beside speed: perplexity, and KL and top-1 agreement against eager's logits on
slices of an English text. Results go to benchmarks/results/ as JSON lines and Markdown.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decode_models import Contestant, contestants
from planish.codegen.bundle import planish_version
from planish.demo_models import LANGUAGE_MODEL, demo_text, hf_folder, load_tokenizer

_RESULTS = Path(__file__).parent / "results"
_SLICE, _SLICES, _PREFILL, _PROMPT, _NEW = 256, 4, 512, 128, 128


@dataclass
class Running:
    """A contestant's process and what it has answered."""

    contestant: Contestant
    process: subprocess.Popen[str]
    load: float = 0.0
    times: dict[str, list[dict[str, Any]]] = field(
        default_factory=lambda: {"prefill": [], "decode": [], "quality": []}
    )

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.contestant.name} died; run decode_worker.py by hand")
        found = json.loads(line)
        self.times.setdefault(order["do"], []).append(found)
        return found

    def rate(self, what: str, clock: str) -> float:
        return statistics.median(t["tokens"] / t[clock] for t in self.times[what])

    def spread(self, what: str, clock: str) -> float:
        rates = [t["tokens"] / t[clock] for t in self.times[what]]
        return (max(rates) - min(rates)) / statistics.median(rates)

    def mean(self, what: str) -> float:
        return statistics.fmean(t[what] for t in self.times["quality"])


def launch(row: Contestant, threads: int) -> Running:
    worker = str(Path(__file__).with_name("decode_worker.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(
        [row.python, worker, row.kind, str(row.path), str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{row.name} does not start; run decode_worker.py by hand")
    return Running(row, process, json.loads(line)["load"])


def measure(rows: list[Running], ids: list[int], repeats: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for number in range(_SLICES):
            text = ids[number * _SLICE : (number + 1) * _SLICE]
            file = str(Path(folder) / f"{number}.npy")
            for row in rows:
                order = {"do": "quality", "ids": text, "file": file, "write": row is rows[0]}
                row.ask(order)
    for _ in range(repeats):
        for row in rows:
            row.ask({"do": "prefill", "ids": ids[:_PREFILL]})
            row.ask({"do": "decode", "ids": ids[:_PROMPT], "count": _NEW})


def size(path: Path) -> int:
    """Bytes on disk."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def told(row: Running, base: Running, clock: str) -> dict[str, Any]:
    found: dict[str, Any] = {"name": row.contestant.name, "bits": row.contestant.bits}
    for what in ("decode", "prefill"):
        found[what] = row.rate(what, clock)
        found[f"{what}_ratio"] = found[what] / base.rate(what, clock)
        found[f"{what}_spread"] = row.spread(what, clock)
    found["perplexity"] = math.exp(row.mean("nll"))
    found |= {"kl": row.mean("kl"), "top1": row.mean("top1"), "load_s": row.load}
    return {**found, "megabytes": size(row.contestant.path) / 1e6}


def markdown(found: list[dict[str, Any]]) -> str:
    lines = [
        "| engine | decode tok/s | ratio | prefill tok/s | ratio | perplexity | KL | top-1 | MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {f['name']} | {f['decode']:.1f} | {f['decode_ratio']:.2f} | {f['prefill']:.0f} | "
        f"{f['prefill_ratio']:.2f} | {f['perplexity']:.2f} | {f['kl']:.4f} | {f['top1']:.3f} | "
        f"{f['megabytes']:.0f} |"
        for f in found
    ]
    return "\n".join(lines)


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "onnxruntime", "onnxruntime-genai")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"planish": planish_version(), "python": platform.python_version(), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", help="the Python of an environment with the peers")
    parser.add_argument("--only", nargs="*", default=[], help="names of contestants")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    asked = parser.parse_args()
    tokenizer = load_tokenizer(hf_folder(LANGUAGE_MODEL))
    ids: list[int] = tokenizer(demo_text())["input_ids"][: max(_PREFILL, _SLICE * _SLICES)]
    rows = [launch(row, asked.threads) for row in contestants(asked.peers, asked.only)]
    measure(rows, ids, asked.repeats)
    found = [told(row, rows[0], asked.clock) for row in rows]
    head = {"command": " ".join(sys.argv), "versions": versions(), "load": os.getloadavg()}
    text = f"{json.dumps(head)}\n\n{markdown(found)}\n"
    _RESULTS.mkdir(exist_ok=True)
    stem = f"decode-{asked.threads}-threads"
    (_RESULTS / f"{stem}.jsonl").write_text("".join(json.dumps(f) + "\n" for f in [head, *found]))
    (_RESULTS / f"{stem}.md").write_text(text)
    print(text)
    for row in rows:
        row.process.kill()


if __name__ == "__main__":
    main()
