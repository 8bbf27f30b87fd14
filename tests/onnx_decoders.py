"""Cached decoders exported to ONNX: tiny ones of many forms, run call by call."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
import zoo
from captured import _version
from filelock import FileLock
from onnx_checks import MARGIN
from planish.codegen.run_onnx import OnnxModel, session_options
from planish.ir.capture import capture_module
from planish.ir.interpret import run
from planish.ir.numerics import relative_error
from planish.ir.program import Program
from planish.ir.program_folder import is_program_folder, load_program, save_program
from planish.ir.read_gguf import cache_folder
from planish.passes.insert_kv_cache import InsertKvCache, empty_past
from planish.passes.pipeline import Pipeline
from planish.recipes import pipeline
from torch import Tensor

WIDE: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16},
    "qwen2": {"head_dim": 16},
    "gemma2": {"head_dim": 16},
    "mistral": {"head_dim": 32},
    "gpt_oss": {"head_dim": 32},
    "phi3": {"hidden_size": 96},
    "cohere": {"hidden_size": 192},
}
"""Options by which the heads of a tiny model fit onnxruntime's kernel (hidden / 6 channels)."""


def _captured(name: str, options: Mapping[str, Any]) -> Program:
    label = "-".join([name, *(f"{key}{value}" for key, value in options.items())])
    folder = cache_folder() / f"tests-{_version()}" / f"{label}-decoder"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not is_program_folder(folder):
            known = zoo.ARCHITECTURES[name]
            changed = dataclasses.replace(known, options={**known.options, **options})
            model = zoo._model(changed, known.attentions[0], 2, 0)
            program = capture_module(model, (), {"input_ids": tokens(2, 19)})
            save_program(program, folder, overwrite=True)
    return load_program(folder)


@functools.cache
def decoder(name: str, wide: bool = False) -> Program:
    """A tiny decoder with a cache; wide: with heads for which onnxruntime has its kernel."""
    program = pipeline("exact").run(_captured(name, WIDE[name] if wide else {}))
    return Pipeline([InsertKvCache()]).run(program)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, zoo.VOCABULARY, (batch, length), generator=generator)


def section(folder: Path) -> dict[str, Any]:
    """What the manifest says of the decoder."""
    return json.loads((folder / "planish.json").read_text())["decoder"]


def assert_calls_agree(program: Program, folder: Path, ids: Tensor, cuts: Sequence[int]) -> None:
    """Over all calls the outputs are as near to a float64 run as the program's own float32 run."""
    model, shared = OnnxModel(folder, threads=1), section(folder)["cache"] == "shared"
    ours, narrow, exact = (empty_past(program, len(ids)) for _ in range(3))
    logits: list[list[Tensor]] = [[], [], []]
    for start, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        piece = ids[:, start:end]
        given = {
            "input_ids": piece,
            **dict(zip(model.input_names[-len(ours) :], ours, strict=True)),
        }
        if shared:
            given["attention_mask"] = torch.ones(len(ids), end, dtype=torch.int64)
        found = list(model(**given).values())
        wanted = run(program, [piece, *narrow])
        true = run(program, [piece, *exact], float64=True)
        for kept, values in zip(logits, (found, wanted, true), strict=True):
            kept.append(values[0])
        ours, narrow, exact = found[1:], wanted[1:], true[1:]
    whole = [
        [torch.cat(kept, 1), *past]
        for kept, past in zip(logits, (ours, narrow, exact), strict=True)
    ]
    for value, theirs, right in zip(*whole, strict=True):
        assert value.shape == theirs.shape
        allowed = MARGIN * relative_error(right, theirs) + torch.finfo(theirs.dtype).eps
        assert relative_error(right, value) <= allowed


class SharedBuffers:
    """A decoder whose past and present are one buffer, at first full of NaN."""

    def __init__(self, folder: Path, batch: int, context: int) -> None:
        self.session = ort.InferenceSession(folder / "model.onnx", session_options(1))
        self.binding: Any = self.session.io_binding()
        self.batch, self.length = batch, 0
        for layer, (heads, key, value) in enumerate(section(folder)["shapes"]):
            for kind, width in (("key", key), ("value", value)):
                buffer = np.full((batch, heads, context, width), np.nan, np.float32)
                kept = ort.OrtValue.ortvalue_from_numpy(buffer)
                self.binding.bind_ortvalue_input(f"past_key_values.{layer}.{kind}", kept)
                self.binding.bind_ortvalue_output(f"present.{layer}.{kind}", kept)

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits of the next tokens [batch, n]."""
        self.length += ids.shape[1]
        mask = np.ones((self.batch, self.length), np.int64)
        self.binding.bind_cpu_input("input_ids", ids.numpy())
        self.binding.bind_cpu_input("attention_mask", mask)
        self.binding.bind_output("logits")
        self.session.run_with_iobinding(self.binding)
        names = [output.name for output in self.session.get_outputs()]
        outputs = dict(zip(self.binding_order(names), self.binding.get_outputs(), strict=True))
        return torch.from_numpy(outputs["logits"].numpy())

    @staticmethod
    def binding_order(names: list[str]) -> list[str]:
        """Outputs come back in the order in which they were bound: the logits last."""
        return [*names[1:], names[0]]
