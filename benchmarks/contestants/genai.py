"""ONNX Runtime GenAI as a contestant, on models of its own builder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Told = Mapping[str, Any]

IMPORTS = ["onnxruntime_genai"]
PACKAGES = ["onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "torch", "transformers"]
CONTESTANTS: list[dict[str, Any]] = [
    {"name": "GenAI float32", "kind": "decoder", "options": {"precision": "fp32"}},
    {
        "name": "GenAI int8",
        "kind": "decoder",
        "heat": "int8",
        "compute": "int8",
        "bits": 9,
        "head_bits": 9,
        "options": {"precision": "int8"},
    },
    {
        "name": "GenAI int4",
        "kind": "decoder",
        "heat": "int4",
        "compute": "int8",
        "bits": 5.15,
        "head_bits": 5.15,
        "options": {"precision": "int4"},
    },
]
ROOM = 512
"""Tokens that the cache has room for after the prompt."""


def prepare(options: Told, model: Told, out: Path) -> None:
    """Run the builder."""
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", model["folder"]]
    more = ["-o", str(out / "model"), "-p", options["precision"], "-e", "cpu"]
    command = [*builder, *more, "-c", str(out / "hub")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["the builder failed"])[-1])


def load(options: Told, model: Told, path: Path, threads: int) -> Genai:
    """An engine of bench_worker."""
    return Genai(path / "model", threads)


class Genai:
    """Greedy search of a batch."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime_genai as og

        self.og = og
        config = og.Config(str(folder))
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = og.Model(config)
        self.generator: Any = None

    def start(self, ids: Array) -> Array:
        self._append(ids)
        return self.step(ids[:, -1])

    def step(self, tokens: Array) -> Array:
        self.generator.generate_next_token()
        return np.asarray(self.generator.get_next_tokens(), np.int64)

    def logits(self, ids: Sequence[int]) -> Array:
        self._append(np.asarray([ids]))
        found = np.asarray(self.generator.get_output("logits"), dtype=np.float32)
        return found.reshape(-1, found.shape[-1])

    def _append(self, ids: Array) -> None:
        parameters = self.og.GeneratorParams(self.model)
        room = ids.shape[1] + ROOM
        parameters.set_search_options(
            max_length=room, min_length=room, do_sample=False, batch_size=len(ids)
        )
        self.generator = None  # its cache goes before the next one comes
        self.generator = self.og.Generator(self.model, parameters)
        self.generator.append_tokens(np.ascontiguousarray(ids, np.int32))
