"""cp.async.bulk: copies of whole tiles between global and shared memory by the copy engine.

Loads announce themselves at an mbarrier, stores belong to bulk groups; until those are waited for,
what a load brings may not be read and what a store takes may not be overwritten: a Fault.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ptx_errors import Fault, NotWaitedFor, OutOfBounds, UnsupportedInstruction
from .ptx_mbarrier import Place, barriers
from .ptx_parse import Instruction, split
from .ptx_state import Handler, Mask, State, addresses
from .ptx_tensormap import tensor_maps

Array = NDArray[Any]

_HINTS = (
    "cp", "async", "bulk", "tensor", "tile", "global", "shared::cta", "shared::cluster",
    "mbarrier::complete_tx::bytes", "bulk_group", "L2::cache_hint", *(f"{n}d" for n in range(1, 6)),
)  # fmt: skip


class BulkGroups:
    """Stores under way: what they read of shared memory, by groups, oldest first."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.open: list[Place] = []
        self.groups: list[list[Place]] = []
        state.on_start.append(self.clear)
        state.on_end.append(self.ended)
        state.shared.proxies = True
        state.shared.holders.append(lambda: [p for g in (*self.groups, self.open) for p in g])

    def clear(self) -> None:
        self.open, self.groups = [], []

    def ended(self) -> None:
        """Shared memory goes with the program: what still reads it reads something else."""
        if self.state.check and (self.open or any(self.groups)):
            raise Fault(
                NotWaitedFor,
                "the program ends while a copy may still read its shared memory",
                expected="cp.async.bulk.wait_group before the end",
            )

    def started(self, place: Place) -> None:
        self.open.append(place)
        self.state.shared.hold([place])

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, rest: int) -> None:
        if len(self.groups) > rest:
            self.groups = self.groups[len(self.groups) - rest :]
            self.state.shared.rehold()


def bulk_groups(state: State) -> BulkGroups:
    """The block's only BulkGroups."""
    if "bulk" not in state.part:
        state.part["bulk"] = BulkGroups(state)
    return state.part["bulk"]


def bulk(state: State, instruction: Instruction, site: int) -> Handler:
    """Builder of all of cp.async.bulk."""
    groups = bulk_groups(state)
    words = instruction.words
    if "commit_group" in words:
        return lambda mask: groups.commit()
    if "wait_group" in words:
        rest = int(instruction.operands[0], 0)
        return lambda mask: groups.wait(rest)
    unknown = set(words).difference(_HINTS)
    if unknown:
        raise Fault(UnsupportedInstruction, f"the modifiers {', '.join(sorted(unknown))} are new")
    load = words.index("global") > next(i for i, w in enumerate(words) if w.startswith("shared"))
    if "tensor" in words:
        return (_load_tile if load else _store_tile)(state, instruction, site)
    return (_load_bytes if load else _store_bytes)(state, instruction, site)


def _corner(state: State, operand: str) -> tuple[Any, list[Array]]:
    """[map, {x, y, ...}]: a function to the map's address, and the coordinates' registers."""
    base, places = split(operand.strip().removeprefix("[").removesuffix("]"))
    parts = [state.registers.source(p, np.int32) for p in split(places.strip("{} "))]
    return addresses(state, f"[{base}]"), parts


def _load_tile(state: State, instruction: Instruction, site: int) -> Handler:
    """[shared], [map, corner], [mbarrier]: elements outside the tensor are zero."""
    goal, origin, arrival = instruction.operands[:3]
    to, signal = addresses(state, goal), addresses(state, arrival)
    of, corner = _corner(state, origin)
    known, maps = barriers(state), tensor_maps(state)

    def run(mask: Mask) -> None:
        for thread in state.active(mask):
            tile = maps.at(int(of()[thread]))
            address, inside, offsets = tile.tile(tuple(int(part[thread]) for part in corner))
            values = np.zeros((len(inside), 1), f"u{tile.width}")
            if inside.any():
                lanes = np.zeros(int(inside.sum()), np.int64)
                values[inside] = state.memory.load(
                    address[inside], lanes, tile.width, site, state.traffic
                )
            start = _start(state, int(to()[thread]), tile.nbytes)
            index = (tile.swizzled(start, offsets) // tile.width)[:, None]
            _land(state, index, tile.width, values, thread, site)
            known.copied(int(signal()[thread]), tile.nbytes, (tile.width, index))

    return run


def _store_tile(state: State, instruction: Instruction, site: int) -> Handler:
    """[map, corner], [shared]: elements outside the tensor are left out."""
    goal, origin = instruction.operands[:2]
    of = addresses(state, origin)
    to, corner = _corner(state, goal)
    groups, maps, shared = bulk_groups(state), tensor_maps(state), state.shared

    def run(mask: Mask) -> None:
        for thread in state.active(mask):
            tile = maps.at(int(to()[thread]))
            address, inside, offsets = tile.tile(tuple(int(part[thread]) for part in corner))
            start = _start(state, int(of()[thread]), tile.nbytes)
            index = (tile.swizzled(start, offsets) // tile.width)[:, None]
            if shared.check:
                shared.read_by_proxy(index, tile.width, site)
                groups.started((tile.width, index))
            values = shared.data[tile.width][index][inside]
            lanes = np.zeros(len(values), np.int64)
            if len(values):
                state.memory.store(address[inside], lanes, tile.width, values, site, state.traffic)

    return run


def _load_bytes(state: State, instruction: Instruction, site: int) -> Handler:
    """[shared], [global], bytes, [mbarrier]."""
    goal, origin, size, arrival = instruction.operands[:4]
    to, of, signal = (addresses(state, each) for each in (goal, origin, arrival))
    count = state.registers.source(size, np.uint32)
    known = barriers(state)

    def run(mask: Mask) -> None:
        for thread in state.active(mask):
            nbytes = int(count[thread])
            words = 16 * np.arange(nbytes // 16)
            lanes = np.zeros(len(words), np.int64)
            start = _start(state, int(to()[thread]), nbytes, 16)
            values = state.memory.load(of()[thread] + words, lanes, 16, site, state.traffic)
            index = (start + words >> 3)[:, None] + np.arange(2)
            _land(state, index, 8, values, thread, site)
            known.copied(int(signal()[thread]), nbytes, (8, index))

    return run


def _store_bytes(state: State, instruction: Instruction, site: int) -> Handler:
    """[global], [shared], bytes."""
    goal, origin, size = instruction.operands[:3]
    to, of = addresses(state, goal), addresses(state, origin)
    count = state.registers.source(size, np.uint32)
    groups, shared = bulk_groups(state), state.shared

    def run(mask: Mask) -> None:
        for thread in state.active(mask):
            nbytes = int(count[thread])
            words = 16 * np.arange(nbytes // 16)
            start = _start(state, int(of()[thread]), nbytes, 16)
            index = (start + words >> 3)[:, None] + np.arange(2)
            if shared.check:
                shared.read_by_proxy(index, 8, site)
                groups.started((8, index))
            lanes = np.zeros(len(words), np.int64)
            values = shared.data[8][index]
            state.memory.store(to()[thread] + words, lanes, 16, values, site, state.traffic)

    return run


def _land(state: State, index: Array, unit: int, values: Array, thread: int, site: int) -> None:
    """Write what a load brings; who still reads it races with the thread that asked for it."""
    shared = state.shared
    if shared.check:
        who = np.full(len(index), thread)
        shared.not_held(index, unit, who)
        shared.overrun(site, unit, index, thread)
    shared.data[unit][index] = values
    shared.generic[unit][index] = 0


def _start(state: State, start: int, nbytes: int, unit: int = 128) -> int:
    """The address of a box in shared memory; a Fault where it may not lie."""
    if start % unit or nbytes % 16 or start < 0 or start + nbytes > state.shared.size:
        raise Fault(
            OutOfBounds,
            "a bulk copy where shared memory cannot hold it",
            expected=f"a multiple of {unit}, within {state.shared.size} bytes",
            found=f"{nbytes} bytes at {start}",
        )
    return start
