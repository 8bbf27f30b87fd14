"""What contestants load: made once, kept with its cost, made anew when its maker changed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .bench_process import PREPARE_SECONDS, Cannot, Interpreters, ask_once
from .bench_roster import BenchModel, Contestant

_COST = "made.json"
_NOT_OURS = ("bench_", "cli", "test_", "demo")


@dataclass(frozen=True)
class Prepared:
    """A contestant's folder and how it came to be.

    made: seconds, cpu, peak (bytes of memory), and facts such as bits. size: bytes on disk.
    """

    path: Path
    key: str
    made: Mapping[str, Any]
    versions: Mapping[str, str]
    size: int


def prepare(
    row: Contestant, model: BenchModel, place: Path, pythons: Interpreters, calibration: Path
) -> Prepared:
    """The contestant's folder below `place`, made on one thread if it is not there.

    Raises Cannot: why it cannot take part.
    """
    python = pythons.of(row)
    versions = _versions(python, row.module)
    key = _key(row, model, versions, calibration.parent.name)
    out = place / model.name / row.slug / key
    if not (out / _COST).is_file():
        shutil.rmtree(out.parent, ignore_errors=True)  # also what other versions made
        out.mkdir(parents=True)
        told = {**model.told(), "calibration": str(calibration)}
        order = {"do": "prepare", "module": row.module, "options": row.options, "out": str(out)}
        cost = ask_once(python, {**order, "model": told}, PREPARE_SECONDS)
        (out / _COST).write_text(json.dumps(cost))
    return Prepared(out, key, json.loads((out / _COST).read_text()), versions, size(out))


@cache
def _versions(python: str, module: str) -> dict[str, str]:
    return ask_once(python, {"do": "versions", "module": module}, 300)["versions"]


def _key(row: Contestant, model: BenchModel, versions: Mapping[str, str], text: str) -> str:
    told: list[Any] = [row.name, row.options, model.told(), dict(versions), text]
    told.append(_source() if "planish" in versions else None)
    if row.module.endswith(".py"):
        told.append(Path(row.module).read_text())
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


@cache
def _source() -> str:
    """Of planish's own code, as far as results depend on it."""
    root, found = Path(__file__).parent, hashlib.sha256()
    folders = [root, *(root / room for room in ("ir", "passes", "kernels", "codegen"))]
    for folder in folders:
        for file in sorted(folder.iterdir()):
            ours = not file.name.startswith(_NOT_OURS) or file.name == "bench_planish.py"
            if file.suffix in (".py", ".c", ".h", ".jinja") and ours:
                found.update(file.read_bytes())
    return found.hexdigest()


def size(path: Path) -> int:
    """Bytes on disk of what lies in a folder, links followed."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name != _COST]
    return sum(file.stat().st_size for file in files)


__all__ = ["Cannot", "Prepared", "prepare", "size"]
