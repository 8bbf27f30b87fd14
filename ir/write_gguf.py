"""A GGUF file, version 3: metadata, then tensors, one in memory at a time."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_ALIGNMENT = 32
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """shape: fastest axis last. kind: the number of its type. make: its bytes, any dtype."""

    shape: tuple[int, ...]
    kind: int
    nbytes: int
    make: Callable[[], Tensor]


def entry_bytes(key: str, value: bool | int | float | str | list[str] | list[int]) -> bytes:
    """One entry of the metadata: booleans, 32-bit numbers, texts, lists of texts or numbers."""
    return _text(key) + _typed(value)


def _typed(value: bool | int | float | str | list[str] | list[int]) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", _TEXT) + _text(value)
    texts = [item for item in value if isinstance(item, str)]
    head = struct.pack("<IIQ", _ARRAY, _TEXT if texts else 5, len(value))
    if texts:
        return head + b"".join(_text(item) for item in texts)
    return head + struct.pack(f"<{len(value)}i", *value)


def write_gguf(path: Path, entries: list[bytes], tensors: Mapping[str, GgufTensor]) -> None:
    """Write entries (as `entry_bytes` makes them) and tensors, each aligned to 32 bytes.

    The metadata may say no other general.alignment.
    """
    infos: list[bytes] = []
    offset = 0
    for name, tensor in tensors.items():
        axes = tensor.shape[::-1]
        infos.append(_text(name) + struct.pack(f"<I{len(axes)}Q", len(axes), *axes))
        infos.append(struct.pack("<IQ", tensor.kind, offset))
        offset += _padded(tensor.nbytes)
    with path.open("wb") as stream:
        stream.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries)))
        stream.writelines(entries)
        stream.writelines(infos)
        stream.write(bytes(_padded(stream.tell()) - stream.tell()))
        for tensor in tensors.values():
            made = tensor.make().detach().contiguous().reshape(-1)
            stream.write(made.view(torch.uint8).numpy().data)
            stream.write(bytes(_padded(tensor.nbytes) - tensor.nbytes))


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded
