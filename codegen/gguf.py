"""Target gguf: one file for llama.cpp, codes bit for bit where its blocks hold them.

Symmetric integers of up to 4 bits become Q4_0 and of up to 8 bits Q8_0, 4-bit codes with float16
offsets Q4_1; scales are repeated for blocks of 32. Everything else is written as floats. The
metadata (sizes, tokenizer) are those of a GGUF file of the same model, the one that the program
comes from or the option source; for some architectures they can be made of a model folder's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ir.encoded import Encoded
from ..ir.errors import UnsupportedByTarget
from ..ir.gguf_header import GgufHeader, read_gguf_header
from ..ir.gguf_names import GgufNames
from ..ir.layout_gguf import LAYOUTS
from ..ir.program import Program
from ..ir.weights import Entry, dense
from ..ir.write_gguf import GgufTensor, entry_bytes, write_gguf
from .checkpoint_entries import checkpoint_entries
from .checkpoint_source import ORIGIN, checkpoint_model
from .gguf_blocks import Block, gguf_block
from .gguf_metadata import gguf_metadata
from .target import Target

_NAME = "gguf"
_FILE_TYPE = "general.file_type"
_FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
_FILE_TYPES = {0: 0, 1: 1, 2: 2, 3: 3, 8: 7, 30: 32}  # of general.file_type, by a tensor's type


def export(
    program: Program, folder: Path, profile: str, metadata: Mapping[str, Any], **options: Any
) -> dict[str, Any]:
    """Write model.gguf. Raises UnsupportedByTarget."""
    model = checkpoint_model(program, options["source"], _NAME)
    entries = checkpoint_entries(program, model, _NAME)
    source = Path(options["source"] or str(program.metadata[ORIGIN]))
    header = read_gguf_header(source) if source.suffix == ".gguf" else None
    if header is None:
        told = gguf_metadata(model, options["pretokenizer"])
        architecture = str(model.settings["model_type"])
    else:
        told = _copied_metadata(header, source)
        architecture = header.architecture
    names = GgufNames(architecture, model.module, source)
    tensors = _tensors(header, names, entries, source)
    write_gguf(folder / "model.gguf", [*told.values(), _file_type(tensors)], tensors)
    kinds = Counter(LAYOUTS[t.kind].name for t in tensors.values() if t.kind in LAYOUTS)
    return {"checkpoint": {"tensors": len(tensors), "blocks": dict(kinds)}}


def _tensors(
    header: GgufHeader | None, names: GgufNames, entries: Mapping[str, Entry], source: Path
) -> dict[str, GgufTensor]:
    """In the order of the source; what the model has no parameter for is copied from there."""
    found: dict[str, GgufTensor] = {}
    first = header.tensors if header is not None else {}
    order = [*first, *(name for name in names.parameter if name not in first)]
    for name in order:
        entry = entries.get(names.parameter.get(name, ""))
        if entry is not None:
            found[name] = _tensor(name, entry, names)
        elif header is not None and name not in names.parameter:
            found[name] = _copied(header, source, name)
    missing = set(entries) - {names.parameter.get(name) for name in found}
    if missing:
        raise UnsupportedByTarget(
            f"a GGUF file of this architecture has no name for {min(missing)}",
            found=f"{len(missing)} weights without a name",
            fix="write another kind of checkpoint",
        )
    return found


def _tensor(name: str, entry: Entry, names: GgufNames) -> GgufTensor:
    if isinstance(entry, Encoded) and len(entry.shape) == 2:
        shape = (entry.rows_shape[0], entry.rows_shape[1])
        block = gguf_block(name, entry)
        order = names.rows(name, shape)
        if order is not None:
            size = shape[0] * shape[1] // block.layout.length * block.layout.nbytes
            return GgufTensor(shape, block.kind, size, lambda: _rows(block, order))
    if entry.dtype not in _FLOATS:
        raise UnsupportedByTarget(f"target gguf has no type for {entry.dtype}", where=name)
    values = _file_values(name, dense(entry), names)
    kind = 0 if values.dim() < 2 else _FLOATS[values.dtype]
    kept = values.float() if kind == 0 else values
    return GgufTensor(tuple(kept.shape), kind, kept.nbytes, lambda: kept)


def _rows(block: Block, order: Tensor) -> Tensor:
    """The blocks, each row where the file has it: order tells the file's row of each row."""
    return block.pack()[torch.argsort(order)]


def _file_values(name: str, values: Tensor, names: GgufNames) -> Tensor:
    """Dense values as the file has them; raises UnsupportedByTarget where that is not known.

    Reading reorders rows, turns matrices or adds a constant; what was found is tried before it is
    believed.
    """
    if values.dim() == 2:
        for stored in (values, values.t()):
            order = names.rows(name, (stored.shape[0], stored.shape[1]))
            if order is not None:
                back = stored[torch.argsort(order)].contiguous()
                if _reads_as(name, back, values, names):
                    return back
    for back in (values, values + (values - _read(name, values, names))):
        if _reads_as(name, back, values, names):
            return back
    raise UnsupportedByTarget(
        f"planish does not know how a GGUF file arranges {name}",
        expected="a tensor whose rows are reordered, or that differs by a constant",
        fix="write another kind of checkpoint",
    )


def _read(name: str, stored: Tensor, names: GgufNames) -> Tensor:
    read = names.values(name, stored.float().numpy())
    return stored if read is None or read.shape != stored.shape else read.to(stored.dtype)


def _reads_as(name: str, stored: Tensor, values: Tensor, names: GgufNames) -> bool:
    read = names.values(name, stored.float().numpy())
    return read is not None and torch.equal(read.to(values.dtype), values)


def _copied(header: GgufHeader, source: Path, name: str) -> GgufTensor:
    place = header.places[name]

    def make() -> Tensor:
        with source.open("rb") as stream:
            stream.seek(place.start)
            return torch.frombuffer(bytearray(stream.read(place.nbytes)), dtype=torch.uint8)

    return GgufTensor(header.tensors[name], place.kind, place.nbytes, make)


def _copied_metadata(header: GgufHeader, source: Path) -> dict[str, bytes]:
    """The source's entries as they are, but for the type of the tensors and their alignment."""
    found: dict[str, bytes] = {}
    with source.open("rb") as stream:
        for key, (start, stop) in header.spans.items():
            stream.seek(start)
            if key not in (_FILE_TYPE, "general.alignment"):
                found[key] = stream.read(stop - start)
    return found


def _file_type(tensors: Mapping[str, GgufTensor]) -> bytes:
    """The entry that tells the type of most bytes."""
    sizes: Counter[int] = Counter()
    for tensor in tensors.values():
        sizes[tensor.kind] += tensor.nbytes
    return entry_bytes(_FILE_TYPE, _FILE_TYPES.get(sizes.most_common(1)[0][0], 0))


TARGET = Target(
    "gguf",
    export,
    profiles=("llama.cpp",),
    doc="a GGUF file for llama.cpp",
    open_options={"source": ("", str), "pretokenizer": ("", str)},
)
