"""Memory of mapped weights: let go of pages that were read, ask for those that come next.

A memory-mapped weight occupies memory from its first reading until its mapping goes, although the
file could give it again at any time. `release` gives such pages back at once; pages that the
process has written to (a private mapping's own copies) and ordinary memory stay as they are.
On other systems than Linux both do nothing.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .weight_entry import Derived, Entry

_WILLNEED, _DONTNEED = 3, 4
_PAGEMAP = Path("/proc/self/pagemap")
_MAPS = Path("/proc/self/maps")
_OF_FILE, _SWAPPED, _PRESENT = (np.uint64(1 << bit) for bit in (61, 62, 63))


def release(*entries: Entry) -> int:
    """Give the clean file pages of these weights back; returns how many bytes that were at most.

    Reading such a weight again reads its file again (or the system's cache of it).
    """
    freed = 0
    for start, stop in _ranges(entries):
        if _only_clean_file_pages(start, stop) and _advise(start, stop, _DONTNEED):
            freed += stop - start
    return freed


def expect(*entries: Entry) -> None:
    """Let the system begin to read mapped weights that are about to be used."""
    for start, stop in _ranges(entries):
        _advise(start, stop, _WILLNEED)


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor's memory is a file's, as far as the system tells."""
    start = tensor.untyped_storage().data_ptr() if tensor.device.type == "cpu" else 0
    if sys.platform != "linux" or not start:
        return False
    with _MAPS.open("r") as stream:
        for line in stream:
            span, _, _, _, inode, *_ = line.split(maxsplit=5)
            first, last = (int(end, 16) for end in span.split("-"))
            if first <= start < last:
                return inode.strip() != "0"
    return False


def stored_tensors(entry: Entry) -> Iterator[Tensor]:
    """The tensors that an entry is kept as: itself, its parts, or its sources' tensors."""
    if isinstance(entry, Tensor):
        yield entry
    elif isinstance(entry, Derived):
        for source in entry.sources:
            yield from stored_tensors(source)
    else:
        for part in getattr(entry, "parts", {}).values():
            if isinstance(part, Tensor):
                yield part


def _ranges(entries: tuple[Entry, ...]) -> Iterator[tuple[int, int]]:
    """The whole pages that hold the tensors: [start, stop) addresses."""
    if sys.platform != "linux":
        return
    page = mmap.PAGESIZE
    for entry in entries:
        for tensor in stored_tensors(entry):
            if tensor.device.type != "cpu" or tensor.layout != torch.strided or not tensor.nbytes:
                continue
            storage = tensor.untyped_storage()
            start, stop = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
            yield start // page * page, -(-stop // page) * page


def _only_clean_file_pages(start: int, stop: int) -> bool:
    """Whether every page in memory can be had again from its file.

    Source: Linux, Documentation/admin-guide/mm/pagemap.rst: 8 bytes a page, bit 61 for a page of a
    file, 62 swapped, 63 present. A private page that was written to is not the file's any more.
    """
    page = mmap.PAGESIZE
    try:
        with _PAGEMAP.open("rb", buffering=0) as stream:
            stream.seek(start // page * 8)
            found = np.frombuffer(stream.read((stop - start) // page * 8), np.uint64)
    except OSError:
        return False
    own = (found & (_PRESENT | _OF_FILE)) == _PRESENT
    return len(found) > 0 and not bool(own.any() or (found & _SWAPPED).any())


def _advise(start: int, stop: int, advice: int) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice) == 0


__all__ = ["expect", "is_mapped", "release", "stored_tensors"]
