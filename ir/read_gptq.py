"""GPTQ checkpoints (AutoGPTQ, GPTQModel): their codes as they are, in our number formats.

A layer is qweight, qzeros, scales and g_idx (the group of each input). Layers quantized in the
order of their activations have groups whose inputs lie apart: they become an `Ordered` format.
Source: AutoGPTQ's and GPTQModel's files; `checkpoint_format` gptq stores zero points less one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .checkpoint_tensors import CheckpointTensors
from .encoded import Encoded, Format
from .errors import UnsupportedCheckpoint
from .format_ordered import Ordered
from .formats import AffineInt
from .layout_gptq import GptqLayout
from .layouts import BitPacked

_WIDTHS = (2, 3, 4, 8)
_VERSIONS = {"gptq": 1, "gptq_v2": 2}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def read_gptq(
    tensors: CheckpointTensors, config: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Encoded]:
    """Take the quantized layers; returns their weights [out, in] by name.

    dtype: of the weights as the model computes with them. Raises UnsupportedCheckpoint,
    MissingTensor and TensorMismatch.
    """
    version = _version(tensors, config)
    bits = int(config.get("bits", 4))
    return {
        f"{layer}.weight": _layer(tensors, layer, bits, version, dtype)
        for layer in tensors.layers("qweight")
    }


def _version(tensors: CheckpointTensors, config: Mapping[str, Any]) -> int:
    named = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    words = str(config.get("pack_dtype", "int32")).lower()
    if named not in _VERSIONS or words != "int32" or int(config.get("bits", 4)) not in _WIDTHS:
        raise UnsupportedCheckpoint(
            "a GPTQ checkpoint of a kind that planish does not read",
            where=tensors.where,
            expected="checkpoint_format gptq or gptq_v2, of 2, 3, 4 or 8 bits in words of int32",
            found=f"checkpoint_format {named}, {config.get('bits', 4)} bits in {words}",
            fix="offer the original checkpoint; planish quantizes it itself",
        )
    return _VERSIONS[named]


def _layer(
    tensors: CheckpointTensors, layer: str, bits: int, version: int, dtype: torch.dtype
) -> Encoded:
    qweight = tensors.take(layer, "qweight", (torch.int32,), 2)
    scales = tensors.take(layer, "scales", _FLOATS, 2)
    qzeros = tensors.take(layer, "qzeros", (torch.int32,), 2)
    length = qweight.shape[0] * 32 // bits
    if tensors.has(layer, "g_idx"):
        group_of = tensors.take(layer, "g_idx", (torch.int32, torch.int64), 1).long()
        length = group_of.numel()
        bits = qweight.shape[0] * 32 // max(length, 1)  # layers may differ in width
    else:
        group_of = None
    rows, groups = qweight.shape[1], scales.shape[0]
    if bits not in _WIDTHS or qweight.shape[0] * 32 != length * bits:
        raise tensors.mismatch(
            f"{layer}.qweight", f"words of {length} inputs", f"{qweight.shape[0]} words"
        )
    tensors.check_shape(layer, "scales", scales, (groups, rows))
    tensors.check_shape(layer, "qzeros", qzeros, (groups, -(-rows * bits // 32)))
    layout = GptqLayout(bits, version)
    codes, zeros = layout.unpack(qweight), layout.unpack_zero_points(qzeros, rows)
    size, order = _groups(tensors, layer, group_of, length, groups)
    if order is not None:
        codes = codes[:, order]
    return affine_entry(bits, size, codes, scales.t().contiguous(), zeros, dtype, order)


def affine_entry(
    bits: int,
    group_size: int | None,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    dtype: torch.dtype,
    order: Tensor | None = None,
) -> Encoded:
    """Codes, scales and zero points [out, ...] as an encoded weight; symmetric if zero is central.

    order: where the columns of `codes` lie in the weight, if they were put in order of groups.
    """
    central = zero_point is None or bool((zero_point == 1 << (bits - 1)).all())
    full = "full" if central and bits == 8 else None  # below 8 bits that is what None means
    affine = AffineInt(bits, group_size, central, scale.dtype, full)
    parts = {"codes": BitPacked(bits).pack(codes), "scale": scale.contiguous()}
    if zero_point is not None and not central:
        parts["zero_point"] = BitPacked(bits).pack(zero_point)
    fmt: Format = affine
    if order is not None:
        fmt, parts = Ordered(affine), {**parts, "order": order.to(torch.int32)}
    return Encoded(fmt, tuple(codes.shape), dtype, -1, parts)


def _groups(
    tensors: CheckpointTensors, layer: str, group_of: Tensor | None, length: int, groups: int
) -> tuple[int | None, Tensor | None]:
    """The size of the groups (None: one for all) and, if they lie apart, the order of inputs."""
    if groups == 1 and (group_of is None or not bool(group_of.any())):
        return None, None
    size = -(-length // groups)
    if group_of is None:
        return size, None
    size = int((group_of == 0).sum())
    plain = torch.arange(length) // max(size, 1)
    if torch.equal(group_of, plain):
        return size, None
    order = torch.argsort(group_of, stable=True)
    if not torch.equal(group_of[order], plain) or int(group_of.max()) != groups - 1:
        raise tensors.mismatch(
            f"{layer}.g_idx",
            f"{groups} groups of one size",
            f"groups of {torch.bincount(group_of.clamp(min=0)).unique().tolist()[:8]} inputs",
        )
    return size, order
