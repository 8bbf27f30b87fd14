"""Tensors from safetensors files, memory-mapped: a tensor costs memory when it is read.

The format: 8 bytes little-endian header length, a JSON header that gives every tensor's dtype,
shape and byte range, then the data. A large checkpoint is several such files (shards) and an index
`*.safetensors.index.json` that says which shard holds which tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from .errors import (
    CorruptFile,
    MissingShard,
    MissingTensor,
    PickleRefused,
    SourceNotFound,
    TruncatedFile,
    UnsupportedCheckpoint,
)

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
INDEX_SUFFIX = ".safetensors.index.json"
_LONGEST_HEADER = 100_000_000
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: bytes [start, stop) of a file, counted from the file's beginning."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file, of an index of shards or of a folder, by name.

    The tensors are views of a private memory mapping: nothing is read before it is used, and
    writing to one leaves the file alone. Each has a storage of its own that spans just its bytes.
    Only a tensor whose place in the file is not aligned to its element size is copied.

    Raises SourceNotFound, PickleRefused, CorruptFile, TruncatedFile, MissingShard, MissingTensor.
    """
    stored = locate_tensors(path)
    mapped: dict[Path, torch.UntypedStorage] = {}
    tensors: dict[str, Tensor] = {}
    for name, place in stored.items():
        if place.file not in mapped:
            mapped[place.file] = _map(place.file)
        tensors[name] = _view(mapped[place.file], place)
    return tensors


def locate_tensors(path: str | Path) -> dict[str, StoredTensor]:
    """The place of every tensor; reads the headers only. Raises as `read_safetensors`."""
    file = find_weights(Path(path))
    if not file.name.endswith(INDEX_SUFFIX):
        return read_header(file)
    weight_map = _read_index(file)
    headers: dict[str, dict[str, StoredTensor]] = {}
    for name, shard in weight_map.items():
        if shard not in headers:
            headers[shard] = _read_shard_header(file, shard)
        if name not in headers[shard]:
            raise MissingTensor(
                f"the shard {shard} lacks the tensor {name}",
                where=str(file),
                expected=f"{name} in {shard}, as the index says",
                found=f"{len(headers[shard])} other tensors",
                fix="the shards and the index are of different checkpoints; copy both again",
            )
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def find_weights(path: Path) -> Path:
    """The safetensors file or index that a path means; raises SourceNotFound, PickleRefused."""
    refuse_pickle(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise SourceNotFound(
            f"no such file or folder: {path}",
            expected="a .safetensors file, an index of shards or a folder with one of them",
            fix="check the path",
        )
    candidates = [path / f"model{INDEX_SUFFIX}", path / "model.safetensors"]
    found = [c for c in candidates if c.is_file()] or sorted(path.glob(f"*{INDEX_SUFFIX}"))
    found = found or sorted(path.glob("*.safetensors"))
    if len(found) == 1 or (found and found[0] in candidates):
        return found[0]
    for file in sorted(path.iterdir()):
        if not found:
            refuse_pickle(file)
    raise SourceNotFound(
        f"the folder {path} holds {len(found) or 'no'} safetensors files and no index",
        expected="model.safetensors or model.safetensors.index.json",
        found=", ".join(f.name for f in found) or "none",
        fix="name the file itself, or save the model with save_pretrained",
    )


def refuse_pickle(path: Path) -> None:
    """Raise PickleRefused for a file whose name says that it is a pickle."""
    if path.suffix.lower() in PICKLE_SUFFIXES and not path.is_dir():
        raise PickleRefused(
            f"{path.name} is a pickle, and planish loads nothing by pickle",
            where=str(path),
            expected="weights as .safetensors or .gguf, or a program saved as .pt2",
            found=f"a {path.suffix} file: reading it would run the code that it holds",
            fix="if you trust it, load it with torch and save it with safetensors or "
            "model.save_pretrained, then offer that",
        )


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name, checked against the file's size.

    Raises CorruptFile and TruncatedFile.
    """
    if not file.is_file():
        raise SourceNotFound(f"no such file: {file}", fix="check the path")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > _LONGEST_HEADER:
            raise _corrupt(file, "a header length in the first 8 bytes", f"{length}, of {size}")
        if 8 + length > size:
            raise _truncated(file, 8 + length, size)
        text = stream.read(length)
    try:
        header: Any = json.loads(text)
    except ValueError as error:
        raise _corrupt(file, "a header in JSON", str(error)) from error
    if not isinstance(header, dict):
        raise _corrupt(file, "a JSON object as header", type(header).__name__)
    stored: dict[str, StoredTensor] = {}
    for name, entry in cast("dict[str, Any]", header).items():
        if name != "__metadata__":
            stored[name] = _place(file, name, entry, 8 + length)
    end = max((place.stop for place in stored.values()), default=8 + length)
    if end > size:
        raise _truncated(file, end, size)
    return stored


def _place(file: Path, name: str, entry: Any, data: int) -> StoredTensor:
    try:
        kind, shape = entry["dtype"], tuple(entry["shape"])
        start, stop = (data + offset for offset in entry["data_offsets"])
    except (TypeError, KeyError, ValueError) as error:
        raise _corrupt(file, f"dtype, shape and data_offsets of {name}", repr(entry)) from error
    if kind not in DTYPES:
        raise UnsupportedCheckpoint(
            f"the tensor {name} has the dtype {kind!r}",
            where=str(file),
            expected=f"one of {', '.join(DTYPES)}",
            found=repr(kind),
            fix="convert the checkpoint to one of these dtypes",
        )
    if not all(isinstance(axis, int) and axis >= 0 for axis in shape):
        raise _corrupt(file, f"a shape of whole numbers for {name}", repr(shape))
    if start < data or stop - start != math.prod(shape) * DTYPES[kind].itemsize:
        raise _corrupt(file, f"{name}: {kind}{list(shape)} in bytes", f"{stop - start} bytes")
    return StoredTensor(name, file, DTYPES[kind], shape, start, stop)


def _map(file: Path) -> torch.UntypedStorage:
    storage = torch.UntypedStorage.from_file(str(file), False, file.stat().st_size)
    return cast("torch.UntypedStorage", storage)


def _view(storage: torch.UntypedStorage, place: StoredTensor) -> Tensor:
    if place.start == place.stop:
        return torch.empty(place.shape, dtype=place.dtype)
    part = cast("torch.UntypedStorage", storage[place.start : place.stop])
    if part.data_ptr() % place.dtype.itemsize:
        part = part.clone()
    return torch.empty(0, dtype=place.dtype).set_(part).view(place.shape)


def _read_index(file: Path) -> Mapping[str, str]:
    try:
        index: Any = json.loads(file.read_text("utf-8"))
        weight_map: dict[str, str] = dict(index["weight_map"])
    except (ValueError, TypeError, KeyError) as error:
        raise _corrupt(file, "a JSON object with 'weight_map'", repr(error)) from error
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise _corrupt(file, "shards named as files beside the index", repr(shard))
    return weight_map


def _read_shard_header(index: Path, shard: str) -> dict[str, StoredTensor]:
    file = index.parent / shard
    refuse_pickle(file)
    if not file.is_file():
        raise MissingShard(
            f"the shard {shard} is missing",
            where=str(index),
            expected=f"{shard} beside its index",
            found="no such file",
            fix="copy every file of the checkpoint",
        )
    return read_header(file)


def _corrupt(file: Path, expected: str, found: str) -> CorruptFile:
    return CorruptFile(
        f"{file.name} is damaged or not what its name says",
        where=str(file),
        expected=expected,
        found=found if len(found) <= 200 else found[:200] + "...",
        fix="copy or download the file again",
    )


def _truncated(file: Path, expected: int, found: int) -> TruncatedFile:
    return TruncatedFile(
        f"{file.name} is truncated",
        where=str(file),
        expected=f"{expected} bytes, as its header says",
        found=f"{found} bytes",
        fix="copy or download the file again",
    )
