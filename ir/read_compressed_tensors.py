"""compressed-tensors checkpoints (llm-compressor, vLLM): their codes as they are.

A layer is weight_packed and weight_shape (pack-quantized) or a weight of integers or float8
(int-quantized, naive-quantized, float-quantized), with weight_scale, weight_zero_point and
weight_g_idx as its scheme has them. Source: the files that the package compressed-tensors writes;
integers are signed there, so half the range is added to them and to their zero points.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .checkpoint_tensors import CheckpointTensors
from .encoded import Encoded
from .errors import UnsupportedCheckpoint
from .layout_words import WordPacked
from .read_float8 import FLOAT8, float8_entry, spread_rows
from .read_gptq import affine_entry

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_OF_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "dense")


def read_compressed_tensors(
    tensors: CheckpointTensors, config: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Encoded]:
    """Take the quantized layers; returns their weights [out, in] by name.

    Raises UnsupportedCheckpoint, MissingTensor and TensorMismatch.
    """
    groups = _groups(tensors, config)
    entries: dict[str, Encoded] = {}
    for layer in tensors.layers("weight_packed"):
        entries[f"{layer}.weight"] = _packed(tensors, layer, _scheme(tensors, groups, layer), dtype)
    for layer in tensors.layers("weight_scale"):
        entries[f"{layer}.weight"] = _naive(tensors, layer, _scheme(tensors, groups, layer), dtype)
    for ending in _OF_ACTIVATIONS:  # of static activation quantization, which is not imported
        for layer in tensors.layers(ending):
            tensors.take(layer, ending)
    return entries


def _groups(tensors: CheckpointTensors, config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The schemes, checked; raises UnsupportedCheckpoint."""
    found: list[Mapping[str, Any]] = list((config.get("config_groups") or {}).values())
    wrong = [group for group in found if not isinstance(group, Mapping) or not group.get("weights")]
    formats = {str(config.get("format") or "dense"), *(_format(group) for group in found)}
    unread = sorted(formats - {*_FORMATS, "mixed-precision", ""})
    sparse = (config.get("sparsity_config") or {}).get("format", "dense")
    if not found or wrong or unread or sparse != "dense":
        raise UnsupportedCheckpoint(
            "a compressed-tensors checkpoint of a kind that planish does not read",
            where=tensors.where,
            expected=f"config_groups with weights, of a format {', '.join(_FORMATS[:-1])}",
            found=", ".join(unread) or f"config_groups {wrong or 'empty'}, sparsity {sparse}",
            fix="offer the original checkpoint; planish quantizes it itself",
        )
    return found


def _format(group: object) -> str:
    return str(group.get("format") or "") if isinstance(group, Mapping) else ""


def _scheme(
    tensors: CheckpointTensors, groups: list[Mapping[str, Any]], layer: str
) -> Mapping[str, Any]:
    """The weights' settings of the group that names this layer, else of one that names its class.

    A path comes before a pattern and both before a class, of which files know no other than
    Linear for a matrix.
    """
    for matches in (_is_path, _is_pattern, _is_class):
        for group in groups:
            if any(matches(str(target), layer) for target in group.get("targets") or ["Linear"]):
                return group["weights"]
    raise tensors.mismatch(layer, "a group of quantization_config that targets it", "none")


def _is_path(target: str, layer: str) -> bool:
    return target == layer or layer.endswith(f".{target}")


def _is_pattern(target: str, layer: str) -> bool:
    return target.startswith("re:") and re.match(target[3:], layer) is not None


def _is_class(target: str, layer: str) -> bool:
    return bool(target) and target[0].isupper()


def _packed(
    tensors: CheckpointTensors, layer: str, scheme: Mapping[str, Any], dtype: torch.dtype
) -> Encoded:
    words = tensors.take(layer, "weight_packed", (torch.int32,), 2)
    shape = tensors.take(layer, "weight_shape", (torch.int64, torch.int32), 1).tolist()
    scale = tensors.take(layer, "weight_scale", _FLOATS)
    bits = int(scheme["num_bits"])
    rows, length = (*shape, 0, 0)[:2]
    layouts = [WordPacked(bits, spaced) for spaced in (False, True)] if 1 < bits < 9 else []
    fitting = [layout for layout in layouts if words.shape == (rows, layout.words(length))]
    if len(shape) != 2 or not fitting:
        expected = f"int32 words of {shape} codes of {bits} bits"
        raise tensors.mismatch(f"{layer}.weight_packed", expected, str(list(words.shape)))
    scale, size = _scales(tensors, layer, scale, scheme, (rows, length))
    zeros = None
    if not scheme.get("symmetric", True):
        kept = tensors.take(layer, "weight_zero_point", (torch.int32, torch.int8))
        zeros = _zero_points(tensors, layer, kept, fitting[0], (rows, scale.shape[1]))
    codes = fitting[0].unpack(words, length)
    size, order = _order(tensors, layer, size, length)
    codes = codes if order is None else codes[:, order]
    _drop(tensors, layer)
    return affine_entry(bits, size, codes, scale, zeros, dtype, order)


def _zero_points(
    tensors: CheckpointTensors, layer: str, kept: Tensor, layout: WordPacked, shape: tuple[int, int]
) -> Tensor:
    """uint8 [out, groups] from words down the outputs, or from plain integers."""
    rows, groups = shape
    if kept.dtype == torch.int8:
        tensors.check_shape(layer, "weight_zero_point", kept, shape)
        return (kept.to(torch.int16) + (1 << (layout.bits - 1))).to(torch.uint8)
    tensors.check_shape(layer, "weight_zero_point", kept, (layout.words(rows), groups))
    return layout.unpack(kept.t(), rows).t().contiguous()


def _naive(
    tensors: CheckpointTensors, layer: str, scheme: Mapping[str, Any], dtype: torch.dtype
) -> Encoded:
    weight = tensors.take(layer, "weight", (torch.int8, *FLOAT8), 2)
    scale = tensors.take(layer, "weight_scale", _FLOATS)
    rows, length = weight.shape
    scale, size = _scales(tensors, layer, scale, scheme, (rows, length))
    if weight.dtype in FLOAT8:
        _drop(tensors, layer)
        whole = scheme.get("strategy") == "tensor"
        return float8_entry(weight, scale, "tensor" if whole else size or "channel", dtype)
    half = 1 << (int(scheme["num_bits"]) - 1)
    zeros = None
    if not scheme.get("symmetric", True):
        kept = tensors.take(layer, "weight_zero_point", (torch.int8,))
        zeros = (kept.reshape(-1, scale.shape[1]).to(torch.int16) + half).to(torch.uint8)
        zeros = zeros.expand(rows, -1)
    codes = weight.to(torch.int16) + half
    if bool((codes < 0).any() | (codes >= 2 * half).any()):
        found = f"{int(codes.min()) - half} to {int(codes.max()) - half}"
        raise tensors.mismatch(f"{layer}.weight", f"integers from {-half} to {half - 1}", found)
    _drop(tensors, layer)
    return affine_entry(int(scheme["num_bits"]), size, codes.to(torch.uint8), scale, zeros, dtype)


def _scales(
    tensors: CheckpointTensors,
    layer: str,
    scale: Tensor,
    scheme: Mapping[str, Any],
    shape: tuple[int, int],
) -> tuple[Tensor, int | None]:
    """Scales [out, groups] and the groups' size; one scale for all is repeated for each output."""
    rows, length = shape
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(rows, 1).contiguous(), None
    block = scheme.get("block_structure")
    if scheme.get("strategy") == "block" and block:
        sides = [int(side) for side in (block if isinstance(block, list) else block.split("x"))]
        name = f"{layer}.weight_scale"
        return spread_rows(tensors, name, scale, sides, torch.Size(shape)), sides[1]
    size = int(scheme.get("group_size") or -1)
    groups = 1 if size <= 0 else -(-length // size)
    scale = scale.reshape(rows, -1) if scale.dim() == 1 and scale.numel() == rows else scale
    tensors.check_shape(layer, "weight_scale", scale, (rows, groups))
    return scale, None if groups == 1 else size


def _order(
    tensors: CheckpointTensors, layer: str, size: int | None, length: int
) -> tuple[int | None, Tensor | None]:
    if not tensors.has(layer, "weight_g_idx"):
        return size, None
    group_of = tensors.take(layer, "weight_g_idx", (torch.int32, torch.int64), 1).long()
    plain = torch.arange(length) // (size or length)
    if bool((group_of < 0).all()) or torch.equal(group_of, plain):  # -1: no order was written
        return size, None
    order = torch.argsort(group_of, stable=True)
    if group_of.numel() != length or not torch.equal(group_of[order], plain):
        raise tensors.mismatch(f"{layer}.weight_g_idx", f"groups of {size} inputs", "other groups")
    return size, order


def _drop(tensors: CheckpointTensors, layer: str) -> None:
    """A symmetric scheme's zero points are zero, where a file has them."""
    tensors.left.pop(f"{layer}.weight_zero_point", None)
