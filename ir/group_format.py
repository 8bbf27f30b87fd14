"""What all formats share that round groups of values by parameters of each group.

A subclass says how parameters are fitted, kept and read back, how a group is rounded to codes by
them and what codes stand for; walking over a weight of any size, axis and dtype is done here.
Everything of a group lies in tensors [rows, groups, ...], in float32 (float64 for such weights).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from .affine import grouped as _grouped
from .affine import half_spacing, non_finite, ungrouped
from .encoded import Encoded, Format, Stored
from .errors import ScaleOverflow
from .grid import Grid
from .layouts import BitPacked
from .weight_blocks import check_weight, compute_dtype, row_blocks, row_slices

Parameters = Mapping[str, Tensor]
Blocks = Callable[[], Iterator[Tensor]]
"""Blocks of groups [some rows, groups, group], as often as it is called."""


class Packing(Protocol):
    """How codes lie in bytes: see `layouts.BitPacked`."""

    def stored(self, length: int) -> int: ...
    def pack(self, codes: Tensor) -> Tensor: ...
    def unpack(self, packed: Tensor, length: int) -> Tensor: ...


class GroupFormat(Format):
    """Codes of `code_bits` bits, rounded and read by parameters of groups.

    Stored parts: "codes" and what `keep` makes of the parameters.
    """

    as_fitted: ClassVar[bool] = False
    """Whether codes are rounded by the parameters before these are rounded themselves."""

    @property
    @abstractmethod
    def code_bits(self) -> int:
        """Bits of a code."""

    @abstractmethod
    def fitted(
        self, groups: Tensor, importance: Tensor | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The parameters of groups that are finite, for a weight of `dtype`, still unrounded."""

    @abstractmethod
    def keep(self, parameters: Parameters, dtype: torch.dtype) -> dict[str, Tensor]:
        """The parameters as they are stored, [rows, ...] or of the whole weight."""

    @abstractmethod
    def restore(self, parts: Parameters, count: int, groups: int) -> dict[str, Tensor]:
        """The inverse of `keep`, in float32 (or float64): [count rows, groups, ...] each."""

    @abstractmethod
    def rounded(self, groups: Tensor, parameters: Parameters) -> Tensor:
        """Codes uint8 of groups [rows, groups, any number]."""

    @abstractmethod
    def values(self, codes: Tensor, parameters: Parameters, dtype: torch.dtype) -> Tensor:
        """What codes [rows, groups, any number] stand for, computed in `dtype`."""

    @abstractmethod
    def bound(self, codes: Tensor, parameters: Parameters, length: int) -> Tensor:
        """Upper bound of |value - weight| in exact arithmetic, float64; length: of a row."""

    @abstractmethod
    def parameters_stored(
        self, rows: tuple[int, ...], groups: int, dtype: torch.dtype
    ) -> dict[str, Stored]:
        """The parts besides codes of a weight of these rows and groups."""

    @property
    def packing(self) -> Packing:
        return BitPacked(self.code_bits)

    def fit(self, blocks: Blocks, importance: Tensor | None, dtype: torch.dtype) -> Parameters:
        """The parameters of all groups; a format whose groups are not apart overrides this."""
        found = [self.fitted(groups, importance, dtype) for groups in blocks()]
        return {name: torch.cat([each[name] for each in found]) for name in found[0]}

    def groups(self, length: int) -> int:
        """How many groups cover `length` values."""
        return -(-length // self.grouping(length))

    def stored(self, shape: Sequence[int], axis: int, dtype: torch.dtype) -> dict[str, Stored]:
        rows = list(shape)
        length = rows.pop(axis)
        codes: Stored = (torch.uint8, (*rows, self.packing.stored(length)))
        kept = self.parameters_stored(tuple(rows), self.groups(length), dtype)
        return {"codes": codes, **kept}

    def encode(self, weight: Tensor, axis: int = -1, *, where: str = "") -> Encoded:
        """Round `weight` [..., out, in]; raises NonFiniteWeight, UnsupportedShape."""
        check_weight(weight, axis, where)
        rows = weight.detach().movedim(axis, -1)
        work, size = compute_dtype(weight.dtype), self.grouping(rows.shape[-1])

        def blocks() -> Iterator[Tensor]:
            for _, block in row_blocks(rows):
                groups = _grouped(block.to(work), size)
                if not bool(groups.isfinite().all()):
                    raise non_finite(groups, where)
                yield groups

        fitted = self.fit(blocks, None, weight.dtype)
        parts = self._kept(fitted, weight.dtype, where)
        return self._encode(weight, axis, fitted if self.as_fitted else None, parts, weight.dtype)

    def _kept(self, fitted: Parameters, dtype: torch.dtype, where: str) -> dict[str, Tensor]:
        """`keep`, with the weight's name in its error."""
        try:
            return self.keep(fitted, dtype)
        except ScaleOverflow as error:
            raise ScaleOverflow(
                error.what,
                where=where,
                expected=error.expected,
                found=error.found,
                fix=error.fix,
            ) from None

    def _encode(
        self,
        weight: Tensor,
        axis: int,
        fitted: Parameters | None,
        parts: Parameters,
        dtype: torch.dtype,
    ) -> Encoded:
        """Codes by `fitted` parameters, or by those that are stored."""
        rows = weight.detach().movedim(axis, -1)
        *lead, length = rows.shape
        count, size = rows.numel() // length, self.grouping(length)
        used = fitted or self.restore(parts, count, self.groups(length))
        packing, work = self.packing, compute_dtype(weight.dtype)
        codes = torch.empty(count, packing.stored(length), dtype=torch.uint8, device=weight.device)
        for at, block in row_blocks(rows):
            mine = {name: part[at] for name, part in used.items()}
            found = self.rounded(_grouped(block.to(work), size), mine)
            codes[at] = packing.pack(ungrouped(found, length))
        kept = {"codes": codes.reshape(*lead, -1)}
        for name, part in parts.items():
            shared = name in self.shared_parts
            kept[name] = part if shared else part.reshape(*lead, *part.shape[1:])
        from_end = axis if axis < 0 else axis - weight.dim()
        return Encoded(self, tuple(weight.shape), dtype, from_end, kept)

    def grid(
        self,
        groups: Tensor,
        importance: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        where: str = "",
    ) -> Grid:
        if not bool(groups.isfinite().all()):
            raise non_finite(groups, where)
        own = dtype or groups.dtype
        fitted = self.fit(lambda: iter([groups]), importance, own)
        parts = self._kept(fitted, own, where)
        parameters = self.restore(parts, groups.shape[0], groups.shape[1])
        return Grid(self, parameters, own, {} if self.groups_apart else parts)

    def nearest(self, grid: Grid, values: Tensor) -> Tensor:
        return self.values(self.rounded(values, grid.parameters), grid.parameters, values.dtype)

    def encode_on(
        self, weight: Tensor, grid: Grid, axis: int = -1, *, dtype: torch.dtype | None = None
    ) -> Encoded:
        check_weight(weight, axis, "")
        parts = grid.stored or self.keep(grid.parameters, grid.dtype)
        return self._encode(weight, axis, None, parts, dtype or grid.dtype)

    def parameters_of(self, encoded: Encoded) -> dict[str, Tensor]:
        """The parameters [rows, groups, ...] of an encoded weight, float32 or float64."""
        length, count = encoded.rows_shape[-1], 1
        for size in encoded.rows_shape[:-1]:
            count *= size
        lead = len(encoded.shape) - 1
        flat = {
            name: part if name in self.shared_parts else part.reshape(count, *part.shape[lead:])
            for name, part in encoded.parts.items()
            if name != "codes"
        }
        return self.restore(flat, count, self.groups(length))

    def _walk(self, encoded: Encoded) -> Iterator[tuple[slice, Tensor, dict[str, Tensor]]]:
        """Codes [rows, groups, group] and their parameters, by blocks of rows."""
        length = encoded.rows_shape[-1]
        packed = encoded.parts["codes"].reshape(-1, self.packing.stored(length))
        parameters = self.parameters_of(encoded)
        for at in row_slices(packed.shape[0], length):
            codes = self.packing.unpack(packed[at], length)
            mine = {name: part[at] for name, part in parameters.items()}
            yield at, _grouped(codes, self.grouping(length)), mine

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> Tensor:
        """In float32 (float64 if the weight is), rounded once; never past the dtype's largest."""
        work, largest = compute_dtype(dtype), torch.finfo(dtype).max
        length, device = encoded.rows_shape[-1], encoded.parts["codes"].device
        out = torch.empty(encoded.rows_shape, dtype=dtype, device=device)
        flat = out.view(-1, length)
        for at, codes, parameters in self._walk(encoded):
            values = self.values(codes, parameters, work).clamp_(-largest, largest)
            flat[at] = ungrouped(values, length)
        return out.movedim(-1, encoded.axis).contiguous()

    def worst_error(self, encoded: Encoded) -> Tensor:
        length = encoded.rows_shape[-1]
        device, work = encoded.parts["codes"].device, compute_dtype(encoded.dtype)
        out = torch.empty(encoded.rows_shape, dtype=torch.float64, device=device)
        flat = out.view(-1, length)
        for at, codes, parameters in self._walk(encoded):
            exact = self.bound(codes, parameters, length)
            values = self.values(codes, parameters, torch.float64).abs()
            rounding = 4 * half_spacing(values + exact, work) + half_spacing(values, encoded.dtype)
            # A group of zeros is exact; all else goes through quotients and products.
            bound = torch.where((exact == 0) & (values == 0), 0.0, exact + rounding)
            flat[at] = ungrouped(bound, length)
        return out.movedim(-1, encoded.axis).contiguous()

    def codes(self, encoded: Encoded) -> Tensor:
        return self.packing.unpack(encoded.parts["codes"], encoded.rows_shape[-1])


__all__ = ["Blocks", "GroupFormat", "Packing", "Parameters"]
