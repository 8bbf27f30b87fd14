"""What a checkpoint is written after: the model's configuration, its names, shapes and ties."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..ir.errors import UnsupportedByTarget
from ..ir.program import Program
from ..ir.read_hf_folder import configuration, import_transformers, model_class, read_config

ORIGIN = "origin"
"""Where a program tells the path of the model that it was captured from."""

_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".py", ".onnx", ".h5", ".msgpack")
_LARGEST_COPY = 100_000_000


@dataclass(frozen=True)
class CheckpointModel:
    """The model class of a folder, without its weights.

    folder: where config.json and the tokenizer lie, if anywhere. settings: config.json without its
    quantization. module: on the meta device. shapes: of all parameters and buffers that a
    checkpoint holds. ties: {other name: name}.
    """

    folder: Path | None
    settings: Mapping[str, Any]
    module: nn.Module
    shapes: Mapping[str, torch.Size]
    ties: Mapping[str, str]

    def layer(self, weight: str) -> nn.Module | None:
        """The matrix product or table whose weight this is, or None."""
        path, _, ending = weight.rpartition(".")
        if ending != "weight":
            return None
        module = self.module.get_submodule(path)
        known = isinstance(module, (nn.Linear, nn.Embedding)) or type(module).__name__ == "Conv1D"
        return module if known else None

    @property
    def products(self) -> list[str]:
        """The paths of all matrix products, tied ones too."""
        return [
            path
            for path, module in self.module.named_modules()
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        ]

    def copy_files(self, folder: Path) -> None:
        """Copy what lies beside the weights: tokenizer, chat template, generation settings."""
        if self.folder is None:
            return
        for file in sorted(self.folder.iterdir()):
            skipped = file.suffix in _NOT_COPIED or ".index." in file.name
            named = file.name in ("config.json", "planish.json", "quantize_config.json")
            if skipped or named or file.name.startswith(".") or not file.is_file():
                continue
            if file.stat().st_size <= _LARGEST_COPY:
                shutil.copyfile(file, folder / file.name)


def checkpoint_model(program: Program, source: str, target: str) -> CheckpointModel:
    """The model that a program was captured from; source: its folder or GGUF, "" for its origin.

    Raises UnsupportedByTarget where nothing tells, and the errors of `read_config`.
    """
    path = source_folder(program, source, target)
    settings = read_config(path, quantized=True)
    settings.pop("quantization_config", None)
    transformers = import_transformers()
    config = configuration(transformers, path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return model_of(path, settings, model_class(transformers, config, settings, path), config)


def source_folder(program: Program, source: str, target: str) -> Path:
    """The folder with config.json that a program comes from; raises UnsupportedByTarget."""
    named = source or str(program.metadata.get(ORIGIN) or "")
    path = Path(named)
    if not named or not path.exists():
        raise UnsupportedByTarget(
            f"target {target} writes a model folder, and does not know of which model",
            expected="the folder (with config.json) or GGUF file that the program comes from",
            found=f"{named}, where nothing is" if named else "a program that names none",
            fix="pass it as the target's option source",
        )
    if path.suffix == ".gguf":
        from ..ir.read_gguf import gguf_settings

        path = gguf_settings(path)
    return path


def model_of(
    folder: Path | None, settings: Mapping[str, Any], made: Any, config: Any
) -> CheckpointModel:
    """A model class of transformers with a configuration, built on the meta device."""
    with torch.device("meta"):
        module: nn.Module = made(config)
    state = module.state_dict(keep_vars=True)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    return CheckpointModel(folder, settings, module, shapes, _ties(state))


def _ties(state: Mapping[str, Any]) -> dict[str, str]:
    """Names of one and the same parameter: {other: first}."""
    first: dict[int, str] = {}
    return {
        name: first[id(tensor)]
        for name, tensor in state.items()
        if first.setdefault(id(tensor), name) != name
    }
