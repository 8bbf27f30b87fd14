"""Write a Hugging Face model folder: config.json, sharded safetensors, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import WrongOption
from ..ir.weights import Entry, dense
from ..ir.write_safetensors import Planned, write_safetensors
from .checkpoint_source import CheckpointModel

SHARD_BYTES = 5_000_000_000
_METADATA = {"format": "pt"}
DTYPES = {"keep": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


def planned_entry(entry: Entry, dtype: torch.dtype | None) -> Planned:
    """A dense tensor of a checkpoint, made when it is written; dtype: of floating-point ones."""
    kept = entry.dtype if dtype is None or not entry.dtype.is_floating_point else dtype
    return Planned(tuple(entry.shape), kept, lambda: dense(entry).to(kept), entry)


def planned_tensor(tensor: Tensor, dtype: torch.dtype | None = None) -> Planned:
    kept = tensor.dtype if dtype is None or not tensor.dtype.is_floating_point else dtype
    return Planned(tuple(tensor.shape), kept, lambda: tensor.to(kept))


def made_later(shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Tensor]) -> Planned:
    return Planned(shape, dtype, make)


def write_folder(
    folder: Path,
    model: CheckpointModel,
    tensors: Mapping[str, Planned],
    quantization: Mapping[str, Any],
    *,
    untied: bool,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the tensors and what stands beside them; untied: a head got weights of its own."""
    shards = _shards(tensors, shard_bytes)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0], _METADATA)
    else:
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(folder / name, shard, _METADATA)
            weight_map |= dict.fromkeys(shard, name)
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / "model.safetensors.index.json", index)
    settings = dict(model.settings)
    if quantization:
        settings["quantization_config"] = dict(quantization)
    settings.pop("torch_dtype", None)
    settings["dtype"] = _main_dtype(tensors)
    if untied:
        settings["tie_word_embeddings"] = False
    _write_json(folder / "config.json", settings)
    model.copy_files(folder)


def read_shard_bytes(text: str) -> int:
    """The target's option shard_gb; raises WrongOption."""
    try:
        size = int(float(text) * 1e9)
    except ValueError:
        size = 0
    if size < 1:
        raise WrongOption(
            "option shard_gb is no size",
            expected="a positive number of gigabytes",
            found=repr(text),
            fix="for example shard_gb=5",
        )
    return size


def _shards(tensors: Mapping[str, Planned], shard_bytes: int) -> list[dict[str, Planned]]:
    """In the model's order, each shard at most `shard_bytes` unless one tensor is larger."""
    shards: list[dict[str, Planned]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards


def _main_dtype(tensors: Mapping[str, Planned]) -> str:
    """The dtype of two bytes or more that most floating-point bytes have, as config.json has it."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    most = max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.float32
    return str(most).removeprefix("torch.")


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
