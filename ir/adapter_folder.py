"""The two files of a PEFT adapter folder: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import CorruptFile, PickleRefused, SourceNotFound
from .read_safetensors import PICKLE_SUFFIXES, read_safetensors

_TENSORS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """What the folder says of itself; raises SourceNotFound, CorruptFile."""
    path = folder / _CONFIG
    if not path.is_file():
        raise SourceNotFound(
            f"there is no adapter in {folder}",
            expected=f"a folder with {_CONFIG} and {_TENSORS}",
            fix="give the folder that PEFT's save_pretrained wrote",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptFile(f"{_CONFIG} is not JSON", where=str(path), found=str(error)) from error
    if not isinstance(config, dict):
        raise CorruptFile(f"{_CONFIG} is no JSON object", where=str(path))
    return config  # pyright: ignore[reportUnknownVariableType]


def read_adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """Its tensors by name; raises SourceNotFound, PickleRefused and the errors of safetensors."""
    if (folder / _TENSORS).is_file():
        return read_safetensors(folder / _TENSORS)
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix.lower() in PICKLE_SUFFIXES)
    if pickles:
        raise PickleRefused(
            f"the adapter {folder.name} is stored as a pickle, and planish loads nothing by pickle",
            where=str(folder / pickles[0]),
            expected=_TENSORS,
            found=f"{pickles[0]}: reading it would run the code that it holds",
            fix="if you trust it, load it with PEFT and save it with save_pretrained",
        )
    raise SourceNotFound(f"the adapter in {folder} has no tensors", expected=_TENSORS)


__all__ = ["read_adapter_config", "read_adapter_tensors"]
