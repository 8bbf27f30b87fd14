"""Write a program as a quantized model folder: what all checkpoint formats have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from ..ir.encoded import Encoded
from ..ir.errors import UnsupportedByTarget
from ..ir.program import Program
from ..ir.weights import Entry
from ..ir.write_safetensors import Planned
from .checkpoint_entries import checkpoint_entries, linear_names
from .checkpoint_folder import DTYPES, planned_entry, read_shard_bytes, write_folder
from .checkpoint_layers import refuse_layer
from .checkpoint_source import CheckpointModel, checkpoint_model

OPTIONS: dict[str, tuple[str, ...]] = {"dtype": tuple(DTYPES)}
OPEN_OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "source": ("", str),
    "shard_gb": ("5", read_shard_bytes),
}


class QuantizedLayer(Protocol):
    """A weight as some checkpoint format sees it; path: of its layer."""

    @property
    def path(self) -> str: ...


L = TypeVar("L", bound=QuantizedLayer)


@dataclass(frozen=True)
class Layers(Generic[L]):
    """The quantized layers of a checkpoint, and the paths of matrices that stay dense."""

    quantized: Mapping[str, L]
    dense: list[str]


@dataclass(frozen=True)
class CheckpointFormat(Generic[L]):
    """How one format holds a layer.

    layer: the layer of a weight, or None; it must hold what `expected` says, else `fix` helps.
    settings: quantization_config. tensors: those of a layer, given the settings and the dtype of
    floating-point tensors (None: as they are).
    """

    name: str
    layer: Callable[[str, Entry], L | None]
    expected: str
    fix: str
    settings: Callable[[Layers[L]], dict[str, Any]]
    tensors: Callable[[L, Mapping[str, Any], torch.dtype | None], dict[str, Planned]]

    def write(self, program: Program, folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
        """Write the folder; returns what the manifest tells. Raises UnsupportedByTarget."""
        model = checkpoint_model(program, options["source"], self.name)
        entries = checkpoint_entries(program, model, self.name)
        dtype = DTYPES[options["dtype"]]
        layers = self._layers(entries, model)
        settings = self.settings(layers)
        tensors: dict[str, Planned] = {}
        for name, entry in entries.items():
            if name in layers.quantized:
                tensors |= self.tensors(layers.quantized[name], settings, dtype)
            else:
                tensors[name] = planned_entry(entry, dtype)
        write_folder(
            folder,
            model,
            tensors,
            settings,
            untied=any(name in entries for name in model.ties),
            shard_bytes=options["shard_gb"],
        )
        decoded = [
            name
            for name, entry in entries.items()
            if isinstance(entry, Encoded) and name not in layers.quantized
        ]
        return {"checkpoint": {"quantized_layers": len(layers.quantized), "decoded": decoded}}

    def _layers(self, entries: Mapping[str, Entry], model: CheckpointModel) -> Layers[L]:
        quantized: dict[str, L] = {}
        for name in linear_names(model, entries):
            if not isinstance(entries[name], Encoded):
                continue
            layer = self.layer(name, entries[name])
            if layer is None:
                refuse_layer(self.name, name, entries[name], self.expected, self.fix)
            quantized[name] = layer
        if not quantized:
            raise UnsupportedByTarget(
                f"target {self.name} writes quantized checkpoints, and no matrix of this program "
                "is quantized",
                expected="weights in a number format",
                found="dense weights",
                fix="choose a recipe that quantizes, or save the model with save_pretrained",
            )
        return Layers(quantized, [p for p in model.products if f"{p}.weight" not in quantized])
