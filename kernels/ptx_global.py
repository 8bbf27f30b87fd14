"""Global memory: the storages of the tensor arguments, and races between programs of a grid.

Programs run one after another, so what a GPU would do in any order happens in one. Two programs
race where one writes a byte that another read or wrote (with another value), unless the earlier
one did an atomic operation after its access and the later one before its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .ptx_errors import Fault, OutOfBounds
from .ptx_registers import UNSIGNED
from .ptx_traffic import Traffic

Array = NDArray[Any]

_MANY = 255
_TAGS = 254
_FLUSH = 512


class Block:
    """One range of addresses [low, high) and its bytes."""

    def __init__(self, low: int, data: Array, writable: bool = True) -> None:
        self.low, self.high, self.data, self.writable = low, low + len(data), data, writable
        self.views, self.bases = dict[int, Array](), dict[int, int]()
        for unit, dtype in UNSIGNED.items():
            skip = -low % unit
            count = max(0, len(data) - skip) // unit
            self.views[unit] = data[skip : skip + count * unit].view(dtype)
            self.bases[unit] = low + skip
        self.writer: Array | None = None
        self.reader: Array | None = None
        self.reads: list[tuple[int, Array, int]] = []

    def spread(self, index: Array, unit: int) -> Array:
        """Offsets of the bytes of words [n, words] -> [n, words * unit]."""
        start = index * unit + (self.bases[unit] - self.low)
        return (start[..., None] + np.arange(unit)).reshape(len(index), -1)


class GlobalMemory:
    """Every range that the program may touch. `report`: called with (site, what) per race."""

    def __init__(
        self, tensors: Sequence[Tensor], check: bool, report: Callable[[int, str], None]
    ) -> None:
        self.check, self.report = check, report
        self.blocks: list[Block] = []
        seen = set[int]()
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                raw = torch.empty(0, dtype=torch.uint8).set_(storage)
                self.blocks.append(Block(storage.data_ptr(), raw.numpy()))
        self.last: Block | None = None
        self.program = 0
        self.clock = 0
        self.began = 0
        self.released: dict[int, int] = {}
        self.stamps: dict[int, list[int]] = {}

    def add(self, data: Array, writable: bool) -> int:
        """A range of the simulator's own; returns its address."""
        low = max([1 << 40, *(block.high for block in self.blocks)])
        low = (low // 4096 + 2) * 4096
        self.blocks.append(Block(low, data, writable))
        return low

    def start(self, program: int) -> None:
        """The program of this number begins; the one before has ended."""
        self.released[self.program] = self.clock
        self.program, self.began = program, self.clock

    def load(
        self, address: Array, threads: Array, nbytes: int, site: int, traffic: Traffic
    ) -> Array:
        """Words [active, nbytes / min(nbytes, 8)] at the addresses of the active threads."""
        traffic.count_global(address, threads, nbytes, False)
        unit = min(nbytes, 8)
        block = self._single(address, nbytes)
        if block is not None:
            return self._read(block, address, nbytes, unit, site)
        out = np.zeros((len(address), nbytes // unit), UNSIGNED[unit])
        for block, chosen in self._split(address, threads, nbytes):
            out[chosen] = self._read(block, address[chosen], nbytes, unit, site)
        return out

    def store(
        self,
        address: Array,
        threads: Array,
        nbytes: int,
        values: Array,
        site: int,
        traffic: Traffic,
    ) -> None:
        """Write words [active, nbytes / min(nbytes, 8)]."""
        traffic.count_global(address, threads, nbytes, True)
        unit = min(nbytes, 8)
        for block, chosen in self._split(address, threads, nbytes, True):
            index = self._index(block, address[chosen], nbytes, unit)
            if self.check:
                self._note_write(block, index, unit, values[chosen], site)
            block.views[unit][index] = values[chosen]

    def atomic(
        self, address: Array, threads: Array, nbytes: int, site: int
    ) -> list[tuple[Array, tuple[int, ...]]]:
        """(view, index) of an aligned word, one a thread in order; counts as a synchronisation."""
        self.clock += 1
        found: list[Any] = [None] * len(address)
        for block, chosen in self._split(address, threads, nbytes, True):
            index = self._index(block, address[chosen], nbytes, nbytes)
            if self.check:
                self._note_atomic(block, index, nbytes, site)
            view = block.views[nbytes]
            for place, at in zip(np.flatnonzero(chosen), index[:, 0], strict=True):
                found[place] = (view, (int(at),))
        return found

    def synchronise(self) -> None:
        """A fence of the program."""
        self.clock += 1

    def _single(self, address: Array, nbytes: int) -> Block | None:
        low, high = int(address.min()), int(address.max()) + nbytes
        last = self.last
        if last is not None and last.low <= low and high <= last.high:
            return last
        for block in self.blocks:
            if block.low <= low and high <= block.high:
                self.last = block
                return block
        return None

    def _split(
        self, address: Array, threads: Array, nbytes: int, store: bool = False
    ) -> list[tuple[Block, Any]]:
        block = self._single(address, nbytes)
        parts: list[tuple[Block, Any]] = []
        left = np.ones(len(address), bool)
        for each in [block] if block else self.blocks:
            inside = left & (address >= each.low) & (address + nbytes <= each.high)
            if inside.any():
                parts.append((each, inside))
                left &= ~inside
        readonly = store and any(not block.writable for block, _ in parts)
        if left.any() or readonly:
            self._outside(address, threads, nbytes, left, store)
        return parts

    def _outside(
        self, address: Array, threads: Array, nbytes: int, left: Array, store: bool
    ) -> None:
        first = int(left.argmax())
        at = int(address[first])
        near = min(self.blocks, key=lambda b: max(b.low - at, at + nbytes - b.high), default=None)
        found = f"address {at:#x}"
        if near is not None:
            offset = at - near.low
            found += f", {offset} bytes into a storage of {near.high - near.low} bytes"
        raise Fault(
            OutOfBounds,
            f"{int(left.sum())} threads {'store' if store else 'load'} outside every tensor",
            thread=int(threads[first]),
            expected=f"{nbytes} bytes within the storage of a tensor argument",
            found=found,
        )

    def _index(self, block: Block, address: Array, nbytes: int, unit: int) -> Array:
        if (address & (nbytes - 1)).any():
            first = int((address & (nbytes - 1)).argmax())
            raise Fault(
                OutOfBounds,
                "a global address is not a multiple of the access's width",
                expected=f"a multiple of {nbytes}",
                found=f"address {int(address[first]):#x}",
            )
        index = ((address - block.bases[unit]) >> (unit.bit_length() - 1))[:, None]
        return index + np.arange(nbytes // unit) if nbytes > unit else index

    def _read(self, block: Block, address: Array, nbytes: int, unit: int, site: int) -> Array:
        index = self._index(block, address, nbytes, unit)
        if self.check:
            self._note_read(block, index, unit, site)
        return block.views[unit][index]

    # --- races between programs

    def _tag(self) -> int:
        return self.program % _TAGS + 1

    def _note_read(self, block: Block, index: Array, unit: int, site: int) -> None:
        if block.writer is not None:
            writer = block.writer[block.spread(index, unit)]
            other = (writer != 0) & (writer != self._tag())
            if other.any() and not self._ordered(int(writer[other][0])):
                self.report(site, "a program reads what an earlier one wrote")
        block.reads.append((self._tag(), index, unit))
        if len(block.reads) > _FLUSH:
            self._flush(block)

    def _flush(self, block: Block) -> None:
        if block.reader is None:
            block.reader = np.zeros(len(block.data), np.uint8)
        for tag, index, unit in block.reads:
            at = block.spread(index, unit)
            old = block.reader[at]
            block.reader[at] = np.where((old == 0) | (old == tag), tag, _MANY)
        block.reads.clear()

    def _note_write(self, block: Block, index: Array, unit: int, values: Array, site: int) -> None:
        tag = self._tag()
        if block.writer is None:
            block.writer = np.zeros(len(block.data), np.uint8)
        at = block.spread(index, unit)
        writer = block.writer[at]
        other = (writer != 0) & (writer != tag)
        if other.any():
            new = np.ascontiguousarray(values).view(np.uint8).reshape(at.shape)
            other &= block.data[at] != new
            if other.any() and not self._ordered(int(writer[other][0])):
                self.report(site, "two programs write different values to one place")
        if block.reads or block.reader is not None:
            self._flush(block)
            assert block.reader is not None
            reader = block.reader[at]
            other = (reader != 0) & (reader != tag)
            if other.any() and not self._ordered(int(reader[other][0])):
                self.report(site, "a program overwrites what an earlier one read")
        block.writer[at] = tag
        self.stamps.setdefault(tag, [0, 0])[:] = [self.program, self.clock]

    def _note_atomic(self, block: Block, index: Array, unit: int, site: int) -> None:
        """Atomic operations do not race with each other, only with plain stores before them."""
        if block.writer is None:
            return
        writer = block.writer[block.spread(index, unit)]
        other = (writer != 0) & (writer != self._tag())
        if other.any() and not self._ordered(int(writer[other][0])):
            self.report(site, "a program changes atomically what an earlier one wrote plainly")

    def _ordered(self, tag: int) -> bool:
        """Whether an atomic operation of this program follows one of the tag's program."""
        acquired = self.clock > self.began
        if tag == _MANY or tag not in self.stamps:
            return acquired
        program, stamp = self.stamps[tag]
        return acquired and self.released.get(program, stamp) > stamp
