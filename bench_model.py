"""`planish bench MODEL`: the benchmark's protocol on a user's own model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bench_measures import MEASURES, SHORT
from .bench_results import Results
from .bench_roster import BenchModel, Contestant, Kind, contestants
from .bench_run import Plan, run
from .bench_table import markdown
from .bench_text import BenchText
from .ir.errors import UnknownName, WrongOption

TARGETS = {"onnx": "onnx", "torch": "torch"}
_SLICE, _SLICES, _CALIBRATION = 256, 4, 32


@dataclass(frozen=True)
class Asked:
    """The options of the command, by their names there."""

    source: Path
    recipes: tuple[str, ...] = ("exact",)
    targets: tuple[str, ...] = ("onnx",)
    activations: str | None = None
    calibration: Path | None = None
    threads: tuple[int, ...] = (1,)
    rounds: int = 5
    against: tuple[str, ...] = ()
    full: bool = False
    out: Path | None = None


def bench_model(asked: Asked, tell: Callable[[str], None]) -> str:
    """Measure; the tables as Markdown. Raises UnknownName, UnknownRecipe, WrongOption."""
    if asked.rounds < 1 or min(asked.threads) < 1:
        raise WrongOption(
            "rounds and threads are at least 1",
            expected="--rounds 1 or more, --threads 1 or more",
            found=f"{asked.rounds} rounds, threads {list(asked.threads)}",
        )
    model = read_model(asked.source)
    rows = _rows(asked, model.kind)
    measures = [m for m in (MEASURES if asked.full else SHORT) if m.kind == model.kind]
    with tempfile.TemporaryDirectory(prefix="planish-bench-") as scratch:
        place = Path(scratch)
        text = _text(asked, model, place)
        results = Results((asked.out or place) / "bench.jsonl")
        plan = Plan(model, rows, measures, text, place, asked.threads, asked.rounds)
        run(plan, results, tell)
        told = markdown(results)
        if asked.out is not None:
            _write(results, told, asked.out)
    return told


def read_model(source: Path) -> BenchModel:
    """A folder, or a GGUF file, which is made one; a decoder if it generates text."""
    from .ir.errors import SourceNotFound

    if not source.exists():
        raise SourceNotFound("there is no such model", where=str(source))
    folder = source
    if source.suffix == ".gguf":
        from .ir.read_gguf import gguf_folder

        folder = gguf_folder(source)
    if not (folder / "config.json").is_file():
        raise SourceNotFound(
            "the folder holds no model of transformers, which the baseline is",
            where=str(folder),
            expected="config.json and safetensors files",
            fix="pass the folder or the .gguf file that the model came from",
        )
    config = json.loads((folder / "config.json").read_text())
    architecture = " ".join(config.get("architectures") or [])
    kind: Kind = "decoder" if "ForCausalLM" in architecture else "encoder"
    gguf = source if source.suffix == ".gguf" else None
    return BenchModel.read(folder.name, kind, folder, gguf)


def _rows(asked: Asked, kind: Kind) -> list[Contestant]:
    """The baseline, who else was named, and planish's recipes."""
    from .recipes import find_recipe

    base, *others = contestants(kind)
    known = {row.name: row for row in others if not row.name.startswith("planish")}
    for name in asked.against:
        if name not in known:
            raise UnknownName.named(name, known)
    for target in asked.targets:
        if target not in TARGETS:
            raise UnknownName.named(target, TARGETS)
    rows = [base, *(known[name] for name in asked.against)]
    for recipe in asked.recipes:
        found = find_recipe(recipe)
        for target in asked.targets:
            runner = {"onnx": "onnx", "torch": "decoder" if kind == "decoder" else "compiled"}
            options: dict[str, Any] = {"recipe": recipe, "target": runner[target]}
            options |= {"activations": asked.activations} if asked.activations else {}
            options["calibrated"] = "needs calibration" in found.description or bool(
                asked.calibration
            )
            name = f"planish {found.name} {target}"
            compute = "int8" if asked.activations == "int8" else "float32"
            rows.append(
                Contestant(name, kind, "planish.bench_planish", compute=compute, options=options)
            )
    return rows


def _text(asked: Asked, model: BenchModel, place: Path) -> BenchText:
    """The demo's text in the model's tokens, or random ones where it has no tokenizer."""
    import torch

    from .demo_models import demo_text
    from .tokenizer import TOKENIZER, Tokenizer

    if (Path(model.folder) / TOKENIZER).is_file():
        tokenizer = Tokenizer(Path(model.folder))
        tokens = tokenizer.encode(demo_text(), special=False)
        shown = asked.calibration.read_text(encoding="utf-8") if asked.calibration else ""
        own = tokenizer.encode(shown, special=False) if shown else tokens
        source = "Pride and Prejudice, chapter 1"
    else:
        draw = torch.Generator().manual_seed(0)
        tokens = own = torch.randint(0, model.vocabulary, (4096,), generator=draw).tolist()
        source = "random tokens, for want of a tokenizer: perplexity says nothing"
    length = min(_SLICE if model.kind == "decoder" else 128, len(tokens) // 2, len(own))
    slices = [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
    calibration = [own[i : i + length] for i in range(0, len(own) - length + 1, length)]
    return BenchText(tokens, slices[:_SLICES], calibration[-_CALIBRATION:], place, source)


def _write(results: Results, told: str, out: Path) -> None:
    from .bench_picture import draw

    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.md").write_text(told)
    draw(results, out)
