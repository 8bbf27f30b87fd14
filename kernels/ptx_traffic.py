"""What memory accesses cost: 32-byte sectors of global memory, wavefronts of shared memory.

Both depend on the pattern of addresses only, which loops repeat: patterns are counted once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_LANES = {16: 8, 8: 16}
"""Threads that shared memory serves at once, by bytes a thread; a warp for narrower accesses."""


@dataclass
class Traffic:
    """Counters of one execution.

    Sectors are counted per instruction and warp. A wavefront is one pass over the 32 banks of four
    bytes; ideal wavefronts are those that the distinct words would need without conflicts.
    """

    load_bytes: int = 0
    load_sectors: int = 0
    store_bytes: int = 0
    store_sectors: int = 0
    wavefronts: int = 0
    ideal: int = 0
    _sectors: dict[Any, int] = field(default_factory=dict[Any, int])
    _banks: dict[Any, tuple[int, int]] = field(default_factory=dict[Any, tuple[int, int]])

    def count_global(self, address: Array, threads: Array, nbytes: int, store: bool) -> None:
        """Addresses [active], the threads that they belong to, bytes of each."""
        relative = address - (address[0] & ~31)
        key = (nbytes, relative.tobytes(), threads.tobytes())
        sectors = self._sectors.get(key)
        if sectors is None:
            sectors = self._sectors[key] = _sectors(relative, threads, nbytes)
        if store:
            self.store_bytes += len(address) * nbytes
            self.store_sectors += sectors
        else:
            self.load_bytes += len(address) * nbytes
            self.load_sectors += sectors

    def count_shared(self, address: Array, threads: Array, nbytes: int) -> None:
        relative = address - (address[0] & ~127)
        key = (nbytes, relative.tobytes(), threads.tobytes())
        found = self._banks.get(key)
        if found is None:
            found = self._banks[key] = wavefronts(relative, threads, nbytes)
        self.wavefronts += found[0]
        self.ideal += found[1]


def _sectors(address: Array, threads: Array, nbytes: int) -> int:
    warp = threads.astype(np.int64) // 32 << 40
    first, last = address >> 5, (address + nbytes - 1) >> 5
    return len(np.unique(np.concatenate([warp + first, warp + last])))


def wavefronts(address: Array, threads: Array, nbytes: int) -> tuple[int, int]:
    """(wavefronts, the least that the distinct words need) of one shared access."""
    group = threads.astype(np.int64) // _LANES.get(nbytes, 32)
    words = (address[:, None] >> 2) + np.arange(max(1, nbytes // 4))
    distinct = np.unique((group[:, None] << 32) + words + (1 << 24))
    groups, banks = distinct >> 32, distinct & 31
    count = np.zeros((int(groups.max()) + 1, 32), np.int64)
    np.add.at(count, (groups, banks), 1)
    ideal = -(-np.bincount(groups) // 32)
    return int(count.max(1).sum()), int(ideal.sum())
