"""Where models come from: a path becomes a Program, by what lies there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .ir.capture import capture_exported, capture_module
from .ir.encoded_model import EncodedModel
from .ir.errors import SourceNotFound, UnsupportedCheckpoint
from .ir.program import Program


def load_program(
    path: Path,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any = None,
    kv_cache: bool = False,
    keep_codes: bool = False,
) -> Program:
    """Capture what lies at `path`: a model folder, a saved program, a GGUF or a `.pt2` file.

    args, kwargs: example inputs; made from the model's configuration if none are given
    (for a KV cache: without a padding mask, all rows of a batch being equally long).
    keep_codes: the weights of a GGUF stay in its number formats instead of becoming float32, as
    those of a folder that is quantized already always do.
    Raises SourceNotFound, UnsupportedCheckpoint and the errors of the readers and of capture.
    """
    if not path.exists():
        raise SourceNotFound(
            f"there is nothing at {path}",
            where=str(path),
            expected="a model folder, a .gguf file, a .pt2 file or a saved program",
            fix="check the path",
        )
    if path.is_dir() and (path / "graph.json").is_file():
        from .ir.program_folder import load_program as load_saved

        return load_saved(path)
    if path.suffix == ".pt2":
        from .ir.read_exported import read_exported

        program = capture_exported(read_exported(path))
    else:
        model, encoded = _module(path, keep_codes)
        if not args and not kwargs:
            from .ir.example_inputs import example_inputs

            kwargs = example_inputs(model)
            if kv_cache and "input_ids" in kwargs:
                kwargs.pop("attention_mask", None)
        program = capture_module(model, args, kwargs, dynamic_shapes)
        if encoded is not None:
            encoded.attach(program)
    program.metadata["path"] = path.name
    program.metadata["origin"] = str(path.resolve())
    return program


def _module(path: Path, keep_codes: bool) -> tuple[torch.nn.Module, EncodedModel | None]:
    """The module to capture, and its weights where they are kept as they are stored."""
    if path.is_dir():
        from .ir.quantized_checkpoint import is_quantized_folder, read_quantized_folder
        from .ir.read_hf_folder import read_hf_folder

        if is_quantized_folder(path):
            encoded = read_quantized_folder(path)
            return encoded.module, encoded
        return read_hf_folder(path), None
    if path.suffix == ".gguf" and keep_codes:
        from .ir.read_gguf_codes import read_gguf_codes

        encoded = read_gguf_codes(path)
        return encoded.module, encoded
    if path.suffix == ".gguf":
        from .ir.read_gguf import read_gguf

        return read_gguf(path), None
    from .ir.read_safetensors import refuse_pickle

    refuse_pickle(path)
    raise UnsupportedCheckpoint(
        f"{path.name} is not a kind of model file that planish reads",
        where=str(path),
        expected="a folder with config.json and safetensors, a .gguf file or a .pt2 file",
        found=path.suffix or "a file without an ending",
        fix="pass the folder that holds config.json, not a file inside it",
    )
