"""One contestant of a benchmark, in a process of its own.

python bench_worker.py ORDER, one line of JSON. It imports nothing of planish itself, so that it
runs in the environment of any engine. `"do"` of the order is

- versions: of the engine's packages;
- prepare: write what the engine loads, and tell time and peak memory of that;
- serve: load it; then one order a line on stdin, one answer a line on stdout.

A contestant that cannot do something answers {"cannot": why}.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]


class DecoderEngine(Protocol):
    """Greedy decoding of a batch of texts of one length."""

    def start(self, ids: Array) -> Array:
        """Read prompts int64 [batch, length] into empty caches; the most likely next tokens."""
        ...

    def step(self, tokens: Array) -> Array:
        """Append int64 [batch]; the most likely next ones."""
        ...

    def logits(self, ids: Sequence[int]) -> Array:
        """float32 [len(ids), vocabulary] of one text."""
        ...


class EncoderEngine(Protocol):
    """Hidden states of sentences."""

    def encode(self, ids: Array, mask: Array) -> Array:
        """float32 [sentences, longest, width] of int64 ids and mask [sentences, longest]."""
        ...


def main() -> None:
    order: dict[str, Any] = json.loads(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines that print must not print into the answers

    def reply(found: dict[str, Any]) -> None:
        print(json.dumps(found), file=replies, flush=True)

    pin(order.get("threads", 1))
    try:
        module = load_module(order["module"])
        if order["do"] == "versions":
            reply(versions(module))
        elif order["do"] == "prepare":
            reply(prepare(module, order))
        else:
            serve(module, order, reply)
    except Exception as error:
        reply({"cannot": reason(error)})
        raise


def pin(threads: int) -> None:
    """Run on as many cores as threads, the last ones; the rest of the machine uses the first."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[-threads:])


def load_module(name: str) -> ModuleType:
    """A dotted name, or the path of a file, which may say `from bench_worker import sibling`."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(f"contestant_{Path(name).stem}", name)
    assert spec is not None and spec.loader is not None
    sys.modules.setdefault("bench_worker", sys.modules[__name__])
    made = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def sibling(name: str) -> ModuleType:
    """A file that imports nothing of planish, by its path below planish's folder, without .py."""
    return load_module(str(Path(__file__).resolve().parent / f"{name}.py"))


def versions(module: ModuleType) -> dict[str, Any]:
    """Of the packages that the engine is made of; what is not installed is a reason not to run."""
    found: dict[str, str] = {}
    for package in module.PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return {"cannot": f"{package} is not installed"}
    return {"versions": found}


def prepare(module: ModuleType, order: dict[str, Any]) -> dict[str, Any]:
    """Make the folder; wall and processor seconds, peak memory, and the contestant's facts."""
    import_all(module)
    before = memory()["now"]
    wall, cpu, facts = timed(
        lambda: module.prepare(order["options"], order["model"], Path(order["out"]))
    )
    below = resource.getrusage(resource.RUSAGE_CHILDREN)  # tools that are run as commands
    return {
        "seconds": wall,
        "cpu": cpu + below.ru_utime + below.ru_stime,
        "peak": max(memory()["peak"], below.ru_maxrss * 1024),
        "imported": before,
        **(facts or {}),
    }


def serve(
    module: ModuleType, order: dict[str, Any], reply: Callable[[dict[str, Any]], None]
) -> None:
    import_all(module)
    before = memory()["now"]
    wall, cpu, engine = timed(
        lambda: module.load(order["options"], order["model"], Path(order["path"]), order["threads"])
    )
    reply({"load": wall, "load_cpu": cpu, "imported": before, **memory()})
    tokens: Array = np.zeros(1, np.int64)
    for line in sys.stdin:
        try:
            found, tokens = answer(engine, json.loads(line), tokens)
        except Exception as error:
            found = {"cannot": reason(error)}
        reply(found)


def answer(engine: Any, order: dict[str, Any], tokens: Array) -> tuple[dict[str, Any], Array]:
    """What was asked, and the tokens that the next steps go on from."""
    if order["do"] == "start":
        ids = np.asarray(order["ids"], np.int64)
        wall, cpu, tokens = timed(lambda: engine.start(ids))
        return {"wall": wall, "cpu": cpu, "work": ids.size}, tokens
    if order["do"] == "steps":
        wall, cpu, tokens = timed(lambda: steps(engine, tokens, order["count"]))
        return {"wall": wall, "cpu": cpu, "work": order["count"] * len(tokens)}, tokens
    if order["do"] == "encode":
        ids, mask = padded(order["sentences"])
        wall, cpu, _ = timed(lambda: engine.encode(ids, mask))
        return {"wall": wall, "cpu": cpu, "work": 1}, tokens
    if order["do"] == "embeddings":
        ids, mask = padded(order["sentences"])
        return embeddings(pooled(engine.encode(ids, mask), mask), order), tokens
    if order["do"] == "memory":
        return memory(), tokens
    return quality(engine.logits(order["ids"]), order["ids"], order), tokens


def steps(engine: Any, tokens: Array, count: int) -> Array:
    for _ in range(count):
        tokens = engine.step(tokens)
    return tokens


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """(wall seconds, CPU seconds of the process, result)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def quality(found: Array, ids: Sequence[int], order: dict[str, Any]) -> dict[str, Any]:
    """Against the reference's log-probabilities in order["file"]; the reference writes the file.

    Mean over the tokens of KL(reference || found) in nats, of agreement on the most likely token,
    and of the text's negative log-likelihood.
    """
    wide = log_softmax(np.asarray(found, np.float32))
    if order["write"]:
        np.save(order["file"], wide)
    wanted = np.load(order["file"], mmap_mode="r")
    kl = agreed = 0.0
    for begin in range(0, len(wide), 64):
        mine, truth = wide[begin : begin + 64], wanted[begin : begin + 64].astype(np.float32)
        kl += float((np.exp(truth) * (truth - mine)).sum(dtype=np.float64))
        agreed += float((truth.argmax(-1) == mine.argmax(-1)).sum())
    nll = -float(wide[np.arange(len(ids) - 1), np.asarray(ids[1:])].mean(dtype=np.float64))
    return {"kl": kl / len(wide), "top1": agreed / len(wide), "nll": nll}


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    total = np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)
    return (shifted - np.log(total)).astype(np.float32)


def embeddings(found: Array, order: dict[str, Any]) -> dict[str, Any]:
    """Cosine to the reference's embeddings, the least and the mean over the sentences."""
    wide = np.asarray(found, np.float64)
    if order["write"]:
        np.save(order["file"], wide)
    wanted = np.load(order["file"])
    norms = np.linalg.norm(wanted, axis=-1) * np.linalg.norm(wide, axis=-1)
    cosine = (wanted * wide).sum(-1) / norms
    return {"cosine": float(cosine.min()), "mean_cosine": float(cosine.mean())}


def padded(sentences: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    """int64 ids and mask [sentences, longest]."""
    longest = max(map(len, sentences))
    ids = np.zeros((len(sentences), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, sentence in enumerate(sentences):
        ids[row, : len(sentence)] = sentence
        mask[row, : len(sentence)] = 1
    return ids, mask


def pooled(hidden: Array, mask: Array) -> Array:
    """float32 [batch, length, width] to the mean of the tokens that are not padding."""
    weight = mask[..., None].astype(np.float32)
    return (hidden * weight).sum(1) / weight.sum(1)


def memory() -> dict[str, int]:
    """Bytes of memory held now, and at most so far, files mapped into memory included.

    Not from getrusage: its maximum begins with that of the process that started this one.
    """
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        key: int(told[name].split()[0]) * 1024
        for key, name in (("now", "VmRSS"), ("peak", "VmHWM"))
    }


def import_all(module: ModuleType) -> None:
    for name in module.IMPORTS:
        with contextlib.suppress(ImportError):  # said again, better, by what needs it
            importlib.import_module(name)


def reason(error: BaseException) -> str:
    """One line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


if __name__ == "__main__":
    main()
