"""A GGUF file with its weights in the number formats of its blocks, codes bit for bit.

Nothing is converted to a folder of float32; only the configuration and the tokenizer are read
into the cache once. Needs the extra `hf`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .encoded import Encoded
from .encoded_model import EncodedModel
from .errors import UnsupportedCheckpoint
from .format_affine import AffineInt
from .format_offset import AffineOffset
from .gguf_header import GgufHeader, GgufPlace, read_gguf_header
from .gguf_names import GgufNames
from .layout_gguf import LAYOUTS, Blocks
from .layouts import BitPacked
from .load_state import load_state
from .read_gguf import gguf_settings
from .read_hf_folder import (
    Attention,
    configuration,
    import_transformers,
    model_class,
    read_config,
)

_SIX = BitPacked(6)
_FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}


def read_gguf_codes(file: str | Path, *, attention: Attention | None = None) -> EncodedModel:
    """The model of a GGUF file, computing in float32 with the weights as they are stored.

    Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q2_K to Q6_K stay codes; other types, and tensors that the
    model wants arranged otherwise than by rows, become float32. Raises as `read_gguf`.
    """
    file = Path(file).resolve()
    header = read_gguf_header(file)
    folder = gguf_settings(file)
    settings = read_config(folder, quantized=True)
    transformers = import_transformers()
    config = configuration(transformers, folder)
    found = model_class(transformers, config, settings, folder)
    with torch.device("meta"):
        module: nn.Module = found(config)
    names = GgufNames(header.architecture, module, file)
    dense, entries = _tensors(file, header, names)
    model, _ = load_state(
        found, config, dense, entries, torch.float32, str(file), attention=attention
    )
    return EncodedModel(model.module, model.entries, [_told(header)])


def _told(header: GgufHeader) -> str:
    kinds = sorted({LAYOUTS[p.kind].name for p in header.places.values() if p.kind in LAYOUTS})
    return f"codes of a GGUF file: {', '.join(kinds) or 'none, all its weights are floats'}"


def _tensors(
    file: Path, header: GgufHeader, names: GgufNames
) -> tuple[dict[str, Tensor], dict[str, Encoded]]:
    """Dense tensors and encoded weights, by the model's names."""
    mapped = cast(
        "torch.UntypedStorage",
        torch.UntypedStorage.from_file(str(file), False, file.stat().st_size),
    )
    dense: dict[str, Tensor] = {}
    entries: dict[str, Encoded] = {}
    for name, place in header.places.items():
        if name not in names.parameter:
            continue
        shape, parameter = header.tensors[name], names.parameter[name]
        part = cast("torch.UntypedStorage", mapped[place.start : place.start + place.nbytes])
        stored = torch.empty(0, dtype=torch.uint8).set_(part)
        entry = _entry(stored, place, shape, names, name)
        if entry is not None:
            entries[parameter] = entry
            continue
        values = names.values(name, _dequantized(stored, place, shape, names.where, name).numpy())
        if values is None:
            raise UnsupportedCheckpoint(
                f"the tensor {name} goes into several parameters, and its codes cannot be placed",
                where=names.where,
                fix="read it without keep_codes, or offer a folder of safetensors",
            )
        dense[parameter] = values
    return dense, entries


def _entry(
    stored: Tensor, place: GgufPlace, shape: tuple[int, ...], names: GgufNames, name: str
) -> Encoded | None:
    """The codes of a matrix [out, in], its rows where the model has them; None if not possible."""
    if place.kind not in LAYOUTS or len(shape) != 2:
        return None
    order = names.rows(name, shape)
    if order is None:
        return None
    rows = stored.view(shape[0], -1)
    if not torch.equal(order, torch.arange(shape[0])):
        rows = rows[order]
    return encoded_blocks(LAYOUTS[place.kind].unpack(rows), torch.float32)


def encoded_blocks(blocks: Blocks, dtype: torch.dtype) -> Encoded:
    """The rows of blocks as a weight [rows, length] of one of our formats."""
    parts = {"codes": BitPacked(blocks.bits).pack(blocks.codes), "scale": blocks.scale.contiguous()}
    shape, kept = tuple(blocks.codes.shape), blocks.scale.dtype
    if blocks.six is not None:
        scales, offsets, most, least = blocks.six
        parts |= {name: _SIX.pack(part) for name, part in (("scale", scales), ("offset", offsets))}
        parts |= {"most": most.contiguous(), "least": least.contiguous()}
        return Encoded(
            AffineOffset(blocks.bits, blocks.group_size, k=True), shape, dtype, -1, parts
        )
    if blocks.offset is not None:
        parts["offset"] = blocks.offset.contiguous()
        return Encoded(AffineOffset(blocks.bits, blocks.group_size, kept), shape, dtype, -1, parts)
    full = "full" if blocks.bits == 8 else None
    symmetric = AffineInt(blocks.bits, blocks.group_size, True, kept, full)
    return Encoded(symmetric, shape, dtype, -1, parts)


def _dequantized(
    stored: Tensor, place: GgufPlace, shape: tuple[int, ...], where: str, name: str
) -> Tensor:
    """float32 values of any type that the gguf package knows."""
    if place.kind in _FLOATS:
        return stored.view(_FLOATS[place.kind]).view(shape).to(torch.float32)
    import gguf

    theirs: Any = gguf
    try:
        values = theirs.dequantize(
            stored.view(-1).numpy().reshape(shape[0] if len(shape) > 1 else 1, -1),
            theirs.GGMLQuantizationType(place.kind),
        )
    except (NotImplementedError, ValueError) as error:
        raise UnsupportedCheckpoint(
            f"the tensor {name} is of a type that cannot be read",
            where=where,
            found=str(error),
            fix="offer the model as a folder with config.json and safetensors",
        ) from error
    return torch.from_numpy(values).view(shape)
