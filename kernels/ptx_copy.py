"""cp.async: copies from global to shared memory that land when they are waited for.

The bytes are moved at once, but reading them before the wait is a Fault; when a group lands, its
bytes count as written by their warps in the epoch of the wait, so other warps need a barrier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ptx_parse import Instruction
from .ptx_shared import WRITE
from .ptx_state import Handler, Mask, State, addresses, known

Array = NDArray[Any]

_HINTS = (
    "async", "ca", "cg", "shared", "shared::cta", "L2::64B", "L2::128B", "L2::256B",
    "L2::cache_hint",
)  # fmt: skip


@dataclass(slots=True)
class _Copy:
    site: int
    index: Array
    unit: int
    threads: Array


class CopyGroups:
    """The copies of a block that are under way: those not committed, then groups, oldest first."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.open: list[_Copy] = []
        self.groups: list[list[_Copy]] = []
        state.on_start.append(self.clear)

    def clear(self) -> None:
        self.open, self.groups = [], []

    def started(self, site: int, index: Array, unit: int, threads: Array) -> None:
        self.open.append(_Copy(site, index, unit, threads))
        shared = self.state.shared
        shared.pending[unit][index] = 1
        shared.any_pending = True

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, rest: int) -> None:
        """Land all groups but the last `rest`."""
        shared = self.state.shared
        while len(self.groups) > rest:
            for copy in self.groups.pop(0):
                shared.pending[copy.unit][copy.index] = 0
                if shared.check:
                    values = shared.data[copy.unit][copy.index]
                    shared.note(WRITE, copy.site, copy.unit, copy.index, copy.threads, values)
        for group in (*self.groups, self.open):
            for copy in group:
                shared.pending[copy.unit][copy.index] = 1
        shared.any_pending = bool(self.open) or any(self.groups)


def copy_groups(state: State) -> CopyGroups:
    """The block's only CopyGroups."""
    if "copies" not in state.part:
        state.part["copies"] = CopyGroups(state)
    return state.part["copies"]


def copy_async(state: State, instruction: Instruction, site: int) -> Handler:
    """Builder of cp.async.{ca, cg}, .commit_group, .wait_group and .wait_all."""
    groups = copy_groups(state)
    if "commit_group" in instruction.words:
        return lambda mask: groups.commit()
    if "wait_group" in instruction.words:
        rest = int(instruction.operands[0], 0)
        return lambda mask: groups.wait(rest)
    if "wait_all" in instruction.words:

        def wait_all(mask: Mask) -> None:
            groups.commit()
            groups.wait(0)

        return wait_all
    return _copy(state, instruction, site, groups)


def _copy(state: State, instruction: Instruction, site: int, groups: CopyGroups) -> Handler:
    """cp.async dst, src, bytes[, source bytes]: what the source lacks is zero."""
    known(instruction, *_HINTS)
    goal, origin, size, *rest = instruction.operands
    nbytes = int(size, 0)
    to, of = addresses(state, goal), addresses(state, origin)
    shared, memory, traffic = state.shared, state.memory, state.traffic
    has_part = rest and "L2::cache_hint" not in instruction.words
    given = state.registers.source(rest[0], np.uint32) if has_part else None
    offsets = np.arange(nbytes)

    def run(mask: Mask) -> None:
        threads = state.active(mask)
        if not len(threads):
            return
        unit = min(nbytes, 8)
        if given is None:
            values = memory.load(of()[threads], threads, nbytes, site, traffic)
        else:
            part = given[threads].astype(np.int64)
            values = np.zeros((len(threads), nbytes // unit), f"u{unit}")
            some = part > 0
            if some.any():
                values[some] = memory.load(
                    of()[threads][some], threads[some], nbytes, site, traffic
                )
            raw = values.view(np.uint8).reshape(len(threads), nbytes)
            raw[offsets >= part[:, None]] = 0
        index, unit = shared.store(to()[threads], threads, nbytes, values, site, traffic)
        groups.started(site, index, unit, threads)

    return run
