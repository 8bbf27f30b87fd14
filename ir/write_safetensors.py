"""Tensors to one safetensors file: only one is in memory at a time, mapped sources included."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import UnsupportedShape
from .read_safetensors import DTYPES
from .resident import release
from .weights import Entry

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 64
_CHUNK = 1 << 26


@dataclass(frozen=True)
class Planned:
    """A tensor to come: its shape and dtype, and the call that makes it when it is written.

    source: what the call reads; its mapped pages are given back when the tensor is written.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]
    source: Entry | None = None

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def planned(tensor: Tensor) -> Planned:
    return Planned(tuple(tensor.shape), tensor.dtype, lambda: tensor, tensor)


def write_safetensors(
    path: Path, tensors: Mapping[str, Planned], metadata: Mapping[str, str] | None = None
) -> None:
    """Write all tensors, those of wide elements first, so that each one is aligned.

    metadata: texts for the header, which some readers look for.
    Raises UnsupportedShape for a dtype that the format has no name for.
    """
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise UnsupportedShape(
                f"the tensor {name} cannot be written to safetensors",
                expected=f"one of {', '.join(_NAMES.values())}",
                found=str(tensor.dtype),
                fix="cast it",
            )
        stop = offset + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for name in order:
            for block in _blocks(tensors[name].make()):
                stream.write(block)
            source = tensors[name].source
            if source is not None:
                release(source)


def _blocks(tensor: Tensor) -> Iterable[memoryview]:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        yield from (b.numpy().data for b in flat.view(torch.uint8).split(_CHUNK))
