"""Captured programs of the tiny models, kept in planish's cache: an export takes seconds.

The key of the cache holds everything that a capture depends on; test_capture.py, which tests
capture itself, asks for fresh ones.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import planish
import torch
import transformers
import zoo
from filelock import FileLock
from planish.ir.capture import capture_module
from planish.ir.program import Program
from planish.ir.program_folder import is_program_folder, load_program, save_program
from planish.ir.read_gguf import cache_folder

_SOURCES = (
    "capture.py",
    "functional_form.py",
    "graph_json.py",
    "infer_values.py",
    "interpret.py",
    "ops.py",
    "program.py",
    "program_folder.py",
    "sizes_json.py",
    "values_json.py",
    "weights.py",
)


@functools.cache
def sample(name: str, attention: zoo.Attention) -> zoo.Sample:
    return zoo.build(name, attention)


@functools.cache
def fresh(name: str, attention: zoo.Attention) -> Program:
    """Captured in this process."""
    made = sample(name, attention)
    return capture_module(made.model, made.args, made.kwargs)


@functools.cache
def _version() -> str:
    sources = [Path(planish.__file__).parent / "ir" / name for name in _SOURCES]
    text = b"".join(path.read_bytes() for path in [*sources, Path(zoo.__file__)])
    text += f"{torch.__version__} {transformers.__version__}".encode()
    return hashlib.sha256(text).hexdigest()[:12]


@functools.cache
def _kept(name: str, attention: zoo.Attention) -> Program:
    return kept(f"{name}-{attention}", lambda: fresh(name, attention))


def kept(key: str, capture: Callable[[], Program]) -> Program:
    """What a capture gives, from the cache once it was made; the key says all it depends on."""
    folder = cache_folder() / f"tests-{_version()}" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not is_program_folder(folder):
            save_program(capture(), folder, overwrite=True)
    return load_program(folder)


def captured(name: str, attention: zoo.Attention = "sdpa") -> Program:
    """A private copy of the captured program of a tiny model."""
    return _kept(name, attention).copy()
