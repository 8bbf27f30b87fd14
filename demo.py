"""`planish demo`: two real models through three recipes, exported, run and compared."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .api import trace
from .cli_export import folder_files
from .cli_order import check_folder
from .cli_print import progress_bar, show, table, working
from .codegen.bundle import write_bundle
from .demo_measure import (
    DECODE_FORM,
    SENTENCE,
    SLICE,
    SLICES,
    Row,
    Step,
    measure_encoder,
    measure_language,
)
from .demo_models import (
    ENCODER,
    LANGUAGE_MODEL,
    DemoModel,
    demo_text,
    eager,
    eager_advance,
    hf_folder,
    load_original,
    load_tokenizer,
    onnx_advance,
    onnx_forward,
)
from .ir.errors import PlanishError
from .ir.program_folder import save_program
from .recipes import find_recipe

_SENTENCES, _LENGTH = 8, 32
_COST = ["time s", "peak MB"]


class DemoFailed(PlanishError):
    """A child process of the demo refused its work."""


@dataclass
class Stage:
    """One model of the demo on its way: where things lie, and what its exports reported."""

    model: DemoModel
    source: Path
    captured: Path
    capture_seconds: float
    original_size: int
    exports: dict[str, Path] = field(default_factory=dict[str, Path])
    reports: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])


def run_demo(folder: Path, recipes: list[str], force: bool) -> dict[str, Any]:
    """Run the demo; the exported folders appear in `folder` when all is done."""
    for name in recipes:
        find_recipe(name).passes()
    check_folder(folder, force)
    models = (LANGUAGE_MODEL, ENCODER)
    for model in models:
        model.path()
    told: dict[str, Any] = {}

    def fill(aside: Path) -> dict[str, Any]:
        begun = time.perf_counter()
        stages = [_capture(model, aside) for model in models]
        _export_all(stages, recipes, aside)
        for stage in stages:
            shutil.rmtree(stage.captured)
            told[stage.model.name] = _measure(stage)
        told["seconds"] = time.perf_counter() - begun
        return told

    write_bundle(folder, fill, force=force)
    show(f"{told['seconds']:.0f} s in all; the exported models are in {folder}")
    generating = folder / f"{LANGUAGE_MODEL.name}-{Path(recipes[-1]).stem}"
    show(f'try: planish generate {generating} --chat "What is the capital of France?"')
    return told


def _capture(model: DemoModel, aside: Path) -> Stage:
    """Capture once, for all recipes, and keep the program as a folder."""
    with working(f"read {model.title}"):
        source = hf_folder(model)
        original = load_original(source)
        size = sum(p.numel() * p.element_size() for p in original.parameters())
        del original
    begun = time.perf_counter()
    with working(f"capture {model.title}"):
        program = trace(source, (), _example(model))
    seconds = time.perf_counter() - begun
    captured = save_program(program, aside / f"{model.name}-captured")
    for file in source.iterdir():  # tokenizer and token ids go with the program into its exports
        if file.suffix in (".json", ".jinja", ".txt") and not (captured / file.name).exists():
            shutil.copyfile(file, captured / file.name)
    return Stage(model, source, captured, seconds, size)


def _export_all(stages: list[Stage], recipes: list[str], aside: Path) -> None:
    """Each export in a process of its own, so that its peak memory is its own."""
    work = [(stage, recipe) for stage in stages for recipe in recipes]
    with progress_bar("optimize and export") as advance:
        for done, (stage, recipe) in enumerate(work):
            name = f"{stage.model.name}-{Path(recipe).stem}"
            advance(done, len(work), name)
            stage.exports[recipe] = aside / name
            stage.reports[recipe] = _export(stage, recipe, aside / name)


def _example(model: DemoModel) -> dict[str, Tensor]:
    """A decoder is captured by its tokens alone (its KV cache takes no padding); others by all."""
    return {"input_ids": torch.arange(3, 17).reshape(2, 7)} if model is LANGUAGE_MODEL else {}


def _export(stage: Stage, recipe: str, out: Path) -> dict[str, Any]:
    told = out.with_name(out.name + ".json")
    command = [sys.executable, "-m", "planish", "export", str(stage.captured), "--recipe", recipe]
    command += ["--target", "onnx", "--profile", "ort", "--out", str(out), "--json", str(told)]
    if stage.model is LANGUAGE_MODEL:
        command += ["--kv-cache"]
    if any(step.name == "quantize_weights" for step in find_recipe(recipe).steps):
        command += ["--target-set", "activations=int8"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise DemoFailed(
            f"the export with recipe {recipe} ended with exit code {ended.returncode}",
            where=" ".join(command),
            found=ended.stderr.strip()[-4000:],
        )
    report = json.loads(told.read_text(encoding="utf-8"))
    told.unlink()
    return report


def _measure(stage: Stage) -> dict[str, Any]:
    tokenizer = load_tokenizer(stage.source)
    original = load_original(stage.source)
    language = stage.model is LANGUAGE_MODEL
    run = eager_advance(original) if language else eager(original)
    rows = [Row("original", run, stage.original_size)]
    for recipe, folder in stage.exports.items():
        report = stage.reports[recipe]
        rows.append(
            Row(
                Path(recipe).stem,
                onnx_advance(folder) if language else onnx_forward(folder),
                sum(folder_files(folder).values()),
                report["seconds"]["optimize"] + report["seconds"]["write"],
                report["peak_memory"],
            )
        )
    if language:
        ids = torch.tensor(tokenizer(demo_text())["input_ids"])
        _walk(f"measure {stage.model.title}", measure_language(rows, ids))
        _show_language(stage, rows)
    else:
        ids, mask = _sentences(tokenizer)
        _walk(f"measure {stage.model.title}", measure_encoder(rows, ids, mask))
        _show_encoder(stage, rows)
    return {
        "model": stage.model.title,
        "capture_seconds": stage.capture_seconds,
        "rows": [_row_data(row) for row in rows],
    }


def _walk(what: str, steps: Iterable[Step]) -> None:
    with progress_bar(what) as advance:
        for step in steps:
            advance(*step)


def _sentences(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """The longest paragraphs of the text, cut to one length."""
    lines = sorted(demo_text().split("\n\n"), key=len)[-_SENTENCES:]
    batch = tokenizer(
        lines, padding="max_length", truncation=True, max_length=_LENGTH, return_tensors="pt"
    )
    return batch["input_ids"], batch["attention_mask"]


def _row_data(row: Row) -> dict[str, Any]:
    told = {"name": row.name, "size": row.size, **row.values}
    return {**told, "optimize_seconds": row.seconds, "optimize_peak_memory": row.peak_memory}


def _cost(row: Row) -> list[str]:
    if row.seconds is None or row.peak_memory is None:
        return ["", ""]
    return [f"{row.seconds:.1f}", f"{row.peak_memory / 1e6:,.0f}"]


def _title(stage: Stage) -> str:
    return (
        f"{stage.model.title}, {stage.model.kind} (captured once in {stage.capture_seconds:.1f} s)"
    )


def _show_language(stage: Stage, rows: list[Row]) -> None:
    columns = ["recipe", "MB", "prefill tok/s", "decode tok/s", "ppl", "KL"]
    lines = [
        [
            row.name,
            f"{row.size / 1e6:.1f}",
            f"{row.values['prefill']:.0f}",
            f"{row.values['decode']:.1f}",
            f"{row.values['perplexity']:.2f}",
            f"{row.values['kl']:.2g}",
            *_cost(row),
        ]
        for row in rows
    ]
    show(table([*columns, *_COST], lines, _title(stage)))
    show(
        "original: PyTorch eager, float32; the others: the exported folder in onnxruntime\n"
        f"prefill: {SLICE} tokens at once; decode: {DECODE_FORM}\n"
        "quantized ones round the activations of packed matmuls to 8 bits (activations=int8)\n"
        f"ppl, KL to the original (nats): of {SLICES * SLICE} tokens of English prose\n"
        "time, peak: of optimizing and writing, in a process of its own"
    )


def _show_encoder(stage: Stage, rows: list[Row]) -> None:
    lines = [
        [
            row.name,
            f"{row.size / 1e6:.1f}",
            f"{row.values['latency'] * 1e3:.1f}",
            f"{row.values['cosine']:.5f}",
            *_cost(row),
        ]
        for row in rows
    ]
    show(table(["recipe", "MB", "latency ms", "cosine", *_COST], lines, _title(stage)))
    show(
        f"latency: one text of {SENTENCE} tokens; cosine: of mean-pooled embeddings to the\n"
        f"original, the least of {_SENTENCES} paragraphs"
    )
