"""The header of a GGUF file, read to see that the file is whole before it is unpacked.

The format: magic, version, the counts of tensors and of metadata entries, the entries (key, type,
value), then for each tensor its name, shape, type and offset; the data follow, aligned.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .errors import CorruptFile, SourceNotFound, TruncatedFile

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, str] = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
# Tensor type: (elements of a block, bytes of a block). Other types hold at least a bit an element.
_BLOCKS: dict[int, tuple[int, int]] = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    30: (1, 2),  # BF16
}
_UNKNOWN_BLOCK = (8, 1)
_MOST_ENTRIES, _MOST_AXES = 1_000_000, 8


@dataclass(frozen=True)
class GgufPlace:
    """Where a tensor lies: its number of type, bytes [start, start + nbytes) of the file."""

    kind: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What the file says of itself; `tensors` maps a name to its shape, fastest axis last.

    entries: the metadata's numbers and texts; of arrays only that they are there (None).
    spans: the bytes [start, stop) of the file in which each entry, its key first, is written.
    """

    version: int
    architecture: str
    tensors: dict[str, tuple[int, ...]]
    places: dict[str, GgufPlace]
    entries: dict[str, object]
    spans: dict[str, tuple[int, int]]


def read_gguf_header(file: Path) -> GgufHeader:
    """Read and check the header; raises SourceNotFound, CorruptFile and TruncatedFile."""
    if not file.is_file():
        raise SourceNotFound(
            f"no such GGUF file: {file}", expected="a .gguf file", fix="check the path"
        )
    with file.open("rb") as stream:
        magic = stream.read(4)
        if magic != _MAGIC:
            raise _corrupt(file, f"the first bytes {_MAGIC!r}", repr(magic))
        try:
            return _Reader(file, stream).header()
        except (struct.error, EOFError) as error:
            size = file.stat().st_size
            raise TruncatedFile(
                f"{file.name} ends within its header",
                where=str(file),
                expected="metadata and a list of tensors",
                found=f"the end of the file after {size} bytes",
                fix="copy or download the file again",
            ) from error


class _Reader:
    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self.file, self.stream = file, stream
        self.size = file.stat().st_size

    def header(self) -> GgufHeader:
        version = self.number("<I")
        if version not in (2, 3):
            raise _corrupt(self.file, "GGUF version 2 or 3, little-endian", f"version {version}")
        tensor_count, entry_count = self.number("<Q"), self.number("<Q")
        if max(tensor_count, entry_count) > _MOST_ENTRIES:
            found = f"{tensor_count} tensors, {entry_count} entries"
            raise _corrupt(self.file, f"at most {_MOST_ENTRIES} tensors and entries", found)
        entries: dict[str, object] = {}
        spans: dict[str, tuple[int, int]] = {}
        for _ in range(entry_count):
            start = self.stream.tell()
            key = self.string()
            entries[key] = self.value(self.number("<I"))
            spans[key] = (start, self.stream.tell())
        alignment = entries.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise _corrupt(self.file, "a positive general.alignment", repr(alignment))
        architecture = entries.get("general.architecture")
        if not isinstance(architecture, str):
            raise _corrupt(self.file, "the entry general.architecture", "none")
        shapes, places = self.tensors(tensor_count, alignment)
        return GgufHeader(version, architecture, shapes, places, entries, spans)

    def tensors(
        self, count: int, alignment: int
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, GgufPlace]]:
        shapes: dict[str, tuple[int, ...]] = {}
        places: dict[str, GgufPlace] = {}
        last: tuple[int, str] = (0, "")
        for _ in range(count):
            name = self.string()
            axes = self.number("<I")
            if axes > _MOST_AXES:
                raise _corrupt(self.file, f"at most {_MOST_AXES} axes for {name}", str(axes))
            shapes[name] = tuple(self.number("<Q") for _ in range(axes))[::-1]
            kind, offset = self.number("<I"), self.number("<Q")
            block, block_bytes = _BLOCKS.get(kind, _UNKNOWN_BLOCK)
            size = math.prod(shapes[name]) // block * block_bytes
            places[name] = GgufPlace(kind, offset, size)
            last = max(last, (offset + size, name))
        data = -(-self.stream.tell() // alignment) * alignment
        if data + last[0] > self.size:
            raise TruncatedFile(
                f"{self.file.name} is truncated: the tensor {last[1]} lies past its end",
                where=str(self.file),
                expected=f"at least {data + last[0]} bytes",
                found=f"{self.size} bytes",
                fix="copy or download the file again",
            )
        return shapes, {
            name: GgufPlace(place.kind, data + place.start, place.nbytes)
            for name, place in places.items()
        }

    def number(self, form: str) -> int:
        return struct.unpack(form, self.stream.read(struct.calcsize(form)))[0]

    def string(self) -> str:
        length = self.number("<Q")
        self.expect(length)
        try:
            return self.stream.read(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _corrupt(self.file, "text in UTF-8", str(error)) from error

    def value(self, kind: int) -> object:
        """The value of one entry; of an array only that it is there."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise _corrupt(self.file, "a known type of metadata", f"type {kind}")
        element, count = self.number("<I"), self.number("<Q")
        if element in _SCALARS:
            length = count * struct.calcsize(_SCALARS[element])
            self.expect(length)
            self.stream.seek(length, 1)
            return None
        self.expect(count * 8)
        for _ in range(count):
            if element == _STRING:
                length = self.number("<Q")
                self.expect(length)
                self.stream.seek(length, 1)
            else:
                self.value(element)
        return None

    def expect(self, length: int) -> None:
        """Refuse a length that the rest of the file cannot hold."""
        if self.stream.tell() + length > self.size:
            raise EOFError


def _corrupt(file: Path, expected: str, found: str) -> CorruptFile:
    return CorruptFile(
        f"{file.name} is damaged or no GGUF file",
        where=str(file),
        expected=expected,
        found=found,
        fix="copy or download the file again",
    )
