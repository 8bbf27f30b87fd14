"""Captured programs of real models, kept in planish's cache: an export takes half a minute."""

from __future__ import annotations

import hashlib
from pathlib import Path

import planish
import torch
import transformers
from filelock import FileLock
from planish.ir.capture import capture_module
from planish.ir.program import Program
from planish.ir.program_folder import is_program_folder, load_program, save_program
from planish.ir.read_gguf import cache_folder
from planish.ir.read_hf_folder import read_hf_folder


def saved_language_model(folder: Path) -> Program:
    """The program of a language model's folder, captured with token ids int64 [batch, length]."""
    kept = cache_folder() / f"program-{folder.name}-{_version()}"
    cache_folder().mkdir(parents=True, exist_ok=True)
    with FileLock(f"{kept}.lock"):
        if not is_program_folder(kept):
            ids = torch.arange(3, 3 + 2 * 7).reshape(2, 7)
            program = capture_module(read_hf_folder(folder), (ids,))
            save_program(program, kept, overwrite=True)
    return load_program(kept)


def _version() -> str:
    """Changes with what a capture depends on."""
    source = Path(planish.__file__).parent / "ir"
    text = b"".join((source / name).read_bytes() for name in ("capture.py", "graph_json.py"))
    text += f"{torch.__version__} {transformers.__version__}".encode()
    return hashlib.sha256(text).hexdigest()[:12]
