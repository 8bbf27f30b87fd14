"""Target gguf: one file for llama.cpp, codes bit for bit where its blocks hold them.

Symmetric integers of up to 4 bits become Q4_0 and of up to 8 bits Q8_0, 4-bit codes with float16
offsets Q4_1; scales are repeated for blocks of 32. Everything else is written as floats. The
metadata (sizes, tokenizer) are those of a GGUF file of the same model: the one that the program
comes from, or the option source.
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
from .target import Target

_NAME = "gguf"
_FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
_FILE_TYPES = {0: 0, 1: 1, 2: 2, 3: 3, 8: 7, 30: 32}  # of general.file_type, by a tensor's type


def export(
    program: Program, folder: Path, profile: str, metadata: Mapping[str, Any], **options: Any
) -> dict[str, Any]:
    """Write model.gguf. Raises UnsupportedByTarget."""
    source = Path(options["source"] or str(program.metadata.get(ORIGIN) or ""))
    if source.suffix != ".gguf" or not source.is_file():
        raise UnsupportedByTarget(
            "target gguf takes sizes and tokenizer from a GGUF file of the same model",
            expected="a program that was read from a .gguf file, or one as the option source",
            found=str(source) if source.name else "a program that names no file",
            fix="pass --target-set source=MODEL.gguf, with any types of tensors",
        )
    model = checkpoint_model(program, str(source), _NAME)
    entries = checkpoint_entries(program, model, _NAME)
    header = read_gguf_header(source)
    names = GgufNames(header.architecture, model.module, source)
    tensors = _tensors(header, names, entries, source)
    write_gguf(folder / "model.gguf", _metadata(header, source, tensors), tensors)
    kinds = Counter(LAYOUTS[t.kind].name for t in tensors.values() if t.kind in LAYOUTS)
    return {"checkpoint": {"tensors": len(tensors), "blocks": dict(kinds)}}


def _tensors(
    header: GgufHeader, names: GgufNames, entries: Mapping[str, Entry], source: Path
) -> dict[str, GgufTensor]:
    """In the order of the source; what the model has no parameter for is copied from there."""
    found: dict[str, GgufTensor] = {}
    order = [*header.tensors, *(name for name in names.parameter if name not in header.tensors)]
    for name in order:
        entry = entries.get(names.parameter.get(name, ""))
        if entry is not None:
            found[name] = _tensor(name, entry, names)
        elif name not in names.parameter:
            found[name] = _copied(header, source, name)
    missing = set(entries) - {names.parameter.get(name) for name in found}
    if missing:
        raise UnsupportedByTarget(
            f"a GGUF file of {header.architecture} has no name for {min(missing)}",
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


def _metadata(header: GgufHeader, source: Path, tensors: Mapping[str, GgufTensor]) -> list[bytes]:
    """The source's entries as they are, but for the type of most bytes and the alignment."""
    sizes: Counter[int] = Counter()
    for tensor in tensors.values():
        sizes[tensor.kind] += tensor.nbytes
    kind = _FILE_TYPES.get(sizes.most_common(1)[0][0], 0)
    replaced = ("general.file_type", "general.alignment")
    entries = [entry_bytes("general.file_type", kind)]
    with source.open("rb") as stream:
        for key, (start, stop) in header.spans.items():
            stream.seek(start)
            if key not in replaced:
                entries.append(stream.read(stop - start))
    return entries


TARGET = Target(
    "gguf",
    export,
    profiles=("llama.cpp",),
    doc="a GGUF file for llama.cpp",
    open_options={"source": ("", str)},
)
