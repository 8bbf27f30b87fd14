"""Weights of table formats as the arguments of the Triton kernels that read their codes.

NF4, FP4, fp8, k-means and (beside float32 activations) microscaling go to `linear_codebook`, a
scale a row of signs to `linear_ternary`, microscaling beside 16-bit activations to `linear_mx`.
fp8 weights do not go to `linear_fp8`, which would round the activations too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ir.double_quantization import dynamic_map
from ..ir.encoded import Encoded
from ..ir.format_fp8 import Float8
from ..ir.format_kmeans import KMeans
from ..ir.format_mx import Microscaled, NvFp4
from ..ir.format_nf4 import Blockwise4
from ..ir.format_ternary import Signs
from ..ir.table_format import TableFormat

Arguments = dict[str, Any]
"""Tensors are to be stored; what else there is are constants of the call."""


def coded_arguments(encoded: Encoded) -> tuple[str, Arguments] | str | None:
    """The kernel and its arguments for a matrix of a table format, or why there is none.

    None for formats of another kind.
    """
    fmt = encoded.format
    if not isinstance(fmt, (TableFormat, KMeans)):
        return None
    if len(encoded.shape) != 2:
        return f"it is a stack of matrices {list(encoded.shape)}"
    if encoded.dtype == torch.float64:
        return "it is float64, and the kernel computes in float32"
    group, length = fmt.grouping(encoded.rows_shape[1]), encoded.rows_shape[1]
    halves = encoded.dtype in (torch.float16, torch.bfloat16)
    if isinstance(fmt, Signs):
        return _ternary(encoded, fmt) if group == length and not fmt.binary else None
    if group < length and group % 16:
        return f"its groups of {group} are no multiple of 16"
    if halves and length % 2 == 0 and fmt.name in ("mxfp4", "mxfp8", "nvfp4"):
        return "linear_mx", _microscaling(encoded)
    if isinstance(fmt, KMeans):
        return "linear_codebook", _kmeans(encoded, fmt, group)
    return "linear_codebook", _codebook(encoded, fmt, group)


def _ternary(encoded: Encoded, fmt: Signs) -> tuple[str, Arguments]:
    from ..kernels.linear_ternary import pack

    packed = pack(fmt.codes(encoded).to(torch.int8) - 1, encoded.scale.float())
    return "linear_ternary", {"words": packed.words, "scale": packed.scale}


def _microscaling(encoded: Encoded) -> Arguments:
    """The stored bytes are those the kernel reads."""
    codes, scales = encoded.parts["codes"], encoded.parts["scale"]
    if isinstance(encoded.format, NvFp4):
        whole = encoded.parts["whole"]
        found = {"weight": codes, "scales": scales.view(torch.float8_e4m3fn), "whole": whole}
        return {**found, "format": "nvfp4"}
    assert isinstance(encoded.format, Microscaled)
    wide = encoded.format.code_bits == 8
    weight = codes.view(torch.float8_e4m3fn) if wide else codes
    return {"weight": weight, "scales": scales, "format": encoded.format.name}


def _codebook(encoded: Encoded, fmt: TableFormat, group: int) -> Arguments:
    from ..kernels.linear_codebook import pack

    table = torch.tensor([0.0 if v != v else v for v in fmt.entries], dtype=torch.float32)
    if isinstance(fmt, Blockwise4) and fmt.double:
        more = [dynamic_map(), encoded.parts["second"], encoded.parts["offset"]]
        return _fields(pack(fmt.codes(encoded), encoded.parts["scale"], _widened(table), group,
                            *more))  # fmt: skip
    own = encoded.parts["scale"]
    floats = isinstance(fmt, (Float8, Blockwise4))  # their scales are stored as they are
    scale = own if floats else fmt.factors(encoded).float()
    return _fields(pack(fmt.codes(encoded), scale, _widened(table), group))


def _kmeans(encoded: Encoded, fmt: KMeans, group: int) -> Arguments:
    from ..kernels.linear_codebook import pack

    groups = fmt.groups(encoded.rows_shape[1])
    ones = torch.ones(encoded.rows_shape[0], groups)
    table = _widened(fmt.table(encoded).float())
    return _fields(pack(fmt.codes(encoded), ones, table, group))


def _widened(table: Tensor) -> Tensor:
    """A table [..., entries] of 16 or 256 entries: the kernel's widths; zeros fill it up."""
    entries = table.shape[-1]
    return torch.nn.functional.pad(table, (0, (16 if entries <= 16 else 256) - entries))


def _fields(packed: Any) -> Arguments:
    return {name: value for name, value in vars(packed).items() if value is not None}


__all__ = ["coded_arguments"]
