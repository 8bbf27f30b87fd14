"""Shared memory of one block: its bytes, the copies under way, and the races between barriers.

Races: between two barriers no warp may touch a byte that another warp writes (equal values written
twice are let pass). Accesses are noted as they happen and compared when the barrier comes, which
costs little where, as usual, an epoch only writes or only reads. Lanes of one warp are taken as
synchronous.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ptx_errors import Fault, NotWaitedFor, OutOfBounds
from .ptx_registers import UNSIGNED
from .ptx_traffic import Traffic

Array = NDArray[Any]

READ, WRITE, ATOMIC = 0, 1, 2
EVERY_WARP = 255
"""Owner of what matrix instructions of a warp group read: any writer in the epoch is too late."""

_MOST = 8192


@dataclass(slots=True)
class Access:
    """One noted access: index [active, words] of `unit` bytes, tags [active, 1 or words]."""

    kind: int
    site: int
    unit: int
    index: Array
    tags: Array
    values: Array


class SharedMemory:
    """`size` bytes; addresses start at 0. `report`: called with two sites and a count per race."""

    def __init__(
        self, size: int, threads: int, check: bool, report: Callable[[int, int, int], None]
    ) -> None:
        self.size, self.check, self.report = size, check, report
        room = -(-max(size, 16) // 16) * 16
        self.data = _views(room)
        self.pending = _views(room)
        self.held = _views(room)
        self.owner = _views(room)
        self.generic = _views(room)
        self.any_pending = self.any_held = self.proxies = False
        warps = (np.arange(threads) // 32 + 1).astype(np.uint8)
        self.tags = {unit: np.repeat(warps, unit).view(UNSIGNED[unit]) for unit in UNSIGNED}
        self.log: list[Access] = []
        self.holders: list[Callable[[], list[tuple[int, Array]]]] = []

    def start(self) -> None:
        for views in (self.data, self.pending, self.held, self.generic):
            views[1].fill(0)
        self.any_pending = self.any_held = False
        self.log.clear()

    def load(
        self, address: Array, threads: Array, nbytes: int, site: int, traffic: Traffic
    ) -> Array:
        """Words [active, nbytes / unit] at the addresses of the active threads."""
        index, unit = self.index(address, threads, nbytes)
        traffic.count_shared(address, threads, nbytes)
        if self.check:
            if self.any_pending and self.pending[unit][index].any():
                self._not_landed(index, unit, threads)
            self.note(READ, site, unit, index, threads)
        return self.data[unit][index]

    def store(
        self,
        address: Array,
        threads: Array,
        nbytes: int,
        values: Array,
        site: int,
        traffic: Traffic,
    ) -> tuple[Array, int]:
        """Write words [active, nbytes / unit]; returns where, for copies that land later."""
        index, unit = self.index(address, threads, nbytes)
        traffic.count_shared(address, threads, nbytes)
        if self.check:
            self.not_held(index, unit, threads)
            self.note(WRITE, site, unit, index, threads, values)
            if self.proxies:
                self.generic[unit][index] = 1
        self.data[unit][index] = values
        return index, unit

    def index(self, address: Array, threads: Array, nbytes: int) -> tuple[Array, int]:
        """Indices [active, words] of the accesses, and the bytes of a word."""
        wrong = (address < 0) | (address + nbytes > self.size) | (address & (nbytes - 1) != 0)
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            raise Fault(
                OutOfBounds,
                f"{int(wrong.sum())} threads access shared memory where they must not",
                thread=int(threads[first]),
                expected=f"{nbytes} bytes at a multiple of {nbytes} within {self.size} bytes",
                found=f"address {int(address[first])}",
            )
        unit = min(nbytes, 8)
        index = (address >> (unit.bit_length() - 1))[:, None]
        return (index + np.arange(nbytes // unit) if nbytes > unit else index), unit

    def note(
        self,
        kind: int,
        site: int,
        unit: int,
        index: Array,
        threads: Array | None,
        values: Array | None = None,
    ) -> None:
        """Enter an access into the epoch; threads None: of every warp of a group."""
        if threads is None:
            tags = np.full_like(index, EVERY_WARP, dtype=np.uint8)
            if unit > 1:
                tags = np.repeat(tags.reshape(-1), unit).view(UNSIGNED[unit]).reshape(index.shape)
        else:
            tags = self.tags[unit][threads][:, None]
        self.log.append(Access(kind, site, unit, index, tags, index if values is None else values))
        if len(self.log) > _MOST:
            self._compare()
            del self.log[: _MOST // 2]

    def overrun(self, site: int, unit: int, index: Array, thread: int) -> None:
        """Compare a bulk copy's write with the epoch so far; who waits for it is ordered later."""
        tag = self.tags[unit][thread]
        self.owner[unit][index] = tag
        for access in self.log:
            met = _bytes(self.owner[access.unit][access.index]) != 0
            others = _bytes(np.broadcast_to(access.tags, access.index.shape)) != int(tag) & 255
            if (met & others).any():
                self.report(site, access.site, 1)
        self.owner[unit][index] = 0

    def not_held(self, index: Array, unit: int, threads: Array | None) -> None:
        """A Fault where a matrix instruction under way may still read the bytes."""
        if self.any_held and self.held[unit][index].any():
            thread = None
            if threads is not None:
                thread = int(threads[self.held[unit][index].any(1).argmax()])
            raise Fault(
                NotWaitedFor,
                "shared memory is overwritten while a matrix instruction may still read it",
                thread=thread,
            )

    def hold(self, places: list[tuple[int, Array]]) -> None:
        """An engine reads (unit, index) until it is waited for."""
        for unit, index in places:
            self.held[unit][index] = 1
            self.any_held = True

    def rehold(self) -> None:
        """Some engine is done: only what the holders still list is held."""
        self.held[1].fill(0)
        self.any_held = False
        for holder in self.holders:
            self.hold(holder())

    def landed(self, index: Array, unit: int) -> None:
        """A Fault where the bytes are the goal of a copy under way."""
        if self.any_pending and self.pending[unit][index].any():
            self._not_landed(index, unit, None)

    def fence_proxy(self) -> None:
        """Make ordinary writes visible to the asynchronous proxy (matrix and bulk engines)."""
        if self.proxies:
            self.generic[1].fill(0)

    def read_by_proxy(self, index: Array, unit: int, site: int) -> None:
        """Note that an engine reads; a Fault where the bytes are not there for it yet."""
        self.landed(index, unit)
        if self.generic[unit][index].any():
            raise Fault(
                NotWaitedFor,
                "an asynchronous engine reads shared memory that ordinary stores wrote",
                expected="fence.proxy.async between the stores and the instruction",
            )
        self.note(READ, site, unit, index, None)

    def _not_landed(self, index: Array, unit: int, threads: Array | None) -> None:
        where = self.pending[unit][index].reshape(len(index), -1).any(1).argmax()
        raise Fault(
            NotWaitedFor,
            "shared memory is read that a copy not waited for is filling",
            thread=None if threads is None else int(threads[where]),
            found=f"address {int(index.reshape(len(index), -1)[where][0]) * unit}",
        )

    def barrier(self, warps: Array | None = None) -> None:
        """End the epoch: of all warps, or of some (their tags), whose accesses are then ordered."""
        if not self.log:
            return
        self._compare()
        if warps is None:
            self.log.clear()
            return
        kept = list[Access]()
        for access in self.log:
            owner = _bytes(access.tags).reshape(len(access.index), -1)[:, 0]
            rest = ~np.isin(owner, warps)
            if rest.any():
                parts = (access.index[rest], access.tags[rest], access.values[rest])
                kept.append(Access(access.kind, access.site, access.unit, *parts))
        self.log = kept

    def _compare(self) -> None:
        writes = [access for access in self.log if access.kind != READ]
        if not writes:
            return
        for write in writes:
            self.owner[write.unit][write.index] = write.tags
        for access in self.log:
            got = self.owner[access.unit][access.index]
            if not (got == access.tags).all():
                self._clashes(access, got, writes)
        for write in writes:
            self.owner[write.unit][write.index] = 0

    def _clashes(self, access: Access, got: Array, writes: list[Access]) -> None:
        """Bytes whose last writer in the epoch is another warp than the access's."""
        owner, tags = _bytes(got), _bytes(np.broadcast_to(access.tags, got.shape))
        clash = (owner != tags) & (owner != 0)
        if access.kind == WRITE:
            now = _bytes(self.data[access.unit][access.index])
            clash &= now != _bytes(np.ascontiguousarray(access.values))
        if not clash.any():
            return
        at = np.repeat(access.index.reshape(-1), access.unit) * access.unit
        at = (at + np.tile(np.arange(access.unit), access.index.size))[clash]
        for write in reversed(writes):
            if access.kind == ATOMIC and write.kind == ATOMIC:
                continue
            mine = np.isin(at // write.unit, write.index)
            if mine.any() and write is not access:
                self.report(write.site, access.site, int(mine.sum()))
                return
        if access.kind == WRITE:
            self.report(access.site, access.site, int(clash.sum()))


def _bytes(words: Array) -> Array:
    return np.ascontiguousarray(words).reshape(-1).view(np.uint8)


def _views(size: int) -> dict[int, Array]:
    """The same zeroed bytes as words of 1, 2, 4 and 8 bytes."""
    data = np.zeros(size, np.uint8)
    return {unit: data.view(dtype) for unit, dtype in UNSIGNED.items()}
