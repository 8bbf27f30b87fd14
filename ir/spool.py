"""Weights kept in scratch files: what a pass made takes memory only while it is read.

A program whose weights take more than the budget puts every weight that replaces another one into
such a file (`Weights` asks `spooled`), so that rewriting a model needs the memory of one weight.
The files have no name once they are mapped: they go when the last tensor of theirs goes, however
the process ends.

`PLANISH_SCRATCH`: the folder of the scratch files (default /var/tmp, which is a disk where /tmp is
often memory).
"""

from __future__ import annotations

import dataclasses
import errno
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor

from .encoded import Encoded
from .errors import OutputNotWritable
from .resident import is_mapped, release
from .weight_entry import Entry

_Kind = TypeVar("_Kind", bound=Entry)
_ALIGNMENT = 64
_SMALLEST = 1 << 16  # what is less is not worth a file


def spooled(entry: _Kind) -> _Kind:
    """The same tensor or encoded weight with its values in a scratch file.

    Kinds that hold no tensors of their own (derived weights) and small ones come back as they are.
    Raises OutputNotWritable if there is no room.
    """
    if os.name != "posix":  # elsewhere a mapped file cannot be unlinked
        return entry
    if isinstance(entry, Tensor):
        if entry.nbytes <= _SMALLEST or is_mapped(entry):
            return entry
        return cast("_Kind", _to_file({"": entry})[""])
    if not isinstance(entry, Encoded):
        return entry
    large = [part for part in entry.parts.values() if part.nbytes > _SMALLEST]
    if not large or all(map(is_mapped, large)):
        return entry
    return dataclasses.replace(entry, parts=_to_file(entry.parts))


def scratch_folder() -> Path:
    """Where the scratch files are made."""
    chosen = os.environ.get("PLANISH_SCRATCH")
    if chosen:
        return Path(chosen)
    usual = Path("/var/tmp")
    return usual if os.access(usual, os.W_OK) else Path(tempfile.gettempdir())


def _to_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as views of a new mapped file, whose pages are not in memory yet."""
    starts: dict[str, int] = {}
    offset = 0
    for name, tensor in tensors.items():
        starts[name] = offset
        offset += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    try:
        handle, path = tempfile.mkstemp(prefix="planish-", dir=scratch_folder())
        try:
            with os.fdopen(handle, "wb", buffering=0) as stream:
                for name, tensor in tensors.items():
                    _write(stream.fileno(), tensor, starts[name])
                stream.truncate(max(offset, 1))
            storage = torch.UntypedStorage.from_file(path, shared=False, nbytes=offset)
        finally:
            os.unlink(path)  # noqa: PTH108
    except OSError as error:
        raise _no_room(error) from error
    found = {
        name: torch.empty(0, dtype=tensor.dtype)
        .set_(cast("torch.UntypedStorage", storage[starts[name] : starts[name] + tensor.nbytes]))
        .view(tensor.shape)
        for name, tensor in tensors.items()
    }
    release(*found.values())
    return found


def _write(handle: int, tensor: Tensor, start: int) -> None:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    while len(data):
        written = os.pwrite(handle, data, start)
        data, start = data[written:], start + written


def _no_room(error: OSError) -> OutputNotWritable:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return OutputNotWritable(
        "a scratch file for weights cannot be written",
        where=str(scratch_folder()),
        found="the disk is full" if full else str(error),
        fix="set PLANISH_SCRATCH to a folder with room, or PLANISH_MEMORY to a larger budget",
    )


__all__ = ["scratch_folder", "spooled"]
