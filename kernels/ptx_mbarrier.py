"""mbarrier: barriers in shared memory that threads and bulk copies arrive at (PTX ISA 9.7.13.15).

A phase ends when the expected arrivals came and the announced bytes were copied. Bytes that a copy
brought count as there once a thread has waited for the phase in which they came.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ptx_errors import Fault, NotWaitedFor, UnsupportedInstruction
from .ptx_parse import Instruction
from .ptx_shared import ATOMIC, WRITE
from .ptx_state import Builder, Handler, Mask, State, addresses

Array = NDArray[Any]
_SCOPES = {"shared", "shared::cta", "b64", "release", "cta", "relaxed", "acquire"}

Place = tuple[int, Array]
"""(bytes of a word, indices of words)."""
Landing = Callable[[], None]
"""What becomes true for a thread that has waited."""


@dataclass(slots=True)
class Barrier:
    """expected, arrived: arrivals; bytes: announced and not copied; phase: number of those ended.

    copies: what came in the current phase; landed: what came before and was not waited for;
    warps: those that arrived, by their tags.
    """

    expected: int
    arrived: int = 0
    bytes: int = 0
    phase: int = 0
    copies: list[Landing] = field(default_factory=list[Landing])
    landed: list[Landing] = field(default_factory=list[Landing])
    warps: set[int] = field(default_factory=set[int])
    passed: set[int] = field(default_factory=set[int])

    def turn(self) -> None:
        """End the phase if nothing is missing."""
        if self.arrived < self.expected or self.bytes:
            return
        self.arrived, self.phase = 0, self.phase + 1
        self.landed += self.copies
        self.passed |= self.warps
        self.copies, self.warps = [], set[int]()


class Barriers:
    """All barriers of a block by address."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.at: dict[int, Barrier] = {}
        state.on_start.append(self.at.clear)
        state.shared.proxies = True

    def barrier(self, address: int) -> Barrier:
        if address not in self.at:
            raise Fault(
                NotWaitedFor,
                "a barrier is used that was not initialised",
                expected="mbarrier.init before",
                found=f"address {address}",
            )
        return self.at[address]

    def create(self, address: int, count: int, threads: Array, site: int) -> None:
        index, unit = self.state.shared.index(np.array([address]), threads[:1], 8)
        self.at[address] = Barrier(count)
        self.state.shared.generic[unit][index] = 1
        self.note(WRITE, address, threads[:1], site)

    def note(self, kind: int, address: int, threads: Array, site: int) -> None:
        """The barrier itself is shared memory: it may not be used as it is made or unmade."""
        if self.state.check:
            index = np.full((len(threads), 1), address >> 3)
            self.state.shared.note(kind, site, 8, index, threads, index)

    def remove(self, address: int, threads: Array, site: int) -> None:
        self.note(WRITE, address, threads[:1], site)
        self.at.pop(address, None)

    def arrive(self, address: int, threads: Array, nbytes: int, orders: bool) -> None:
        """Threads arrive; nbytes: announced by each of them."""
        barrier = self.barrier(address)
        barrier.bytes += nbytes * len(threads)
        barrier.arrived += len(threads)
        if orders:
            barrier.warps |= {int(thread) // 32 + 1 for thread in threads}
        barrier.turn()

    def copied(self, address: int, nbytes: int, place: Place) -> None:
        """A bulk copy brings bytes into shared memory."""
        barrier = self.barrier(address)
        shared = self.state.shared
        if shared.check and shared.generic[1][address : address + 8].any():
            raise Fault(
                NotWaitedFor,
                "a copy uses a barrier whose initialisation it may not see",
                expected="fence.proxy.async after mbarrier.init",
            )
        shared.pending[place[0]][place[1]] = 1
        shared.any_pending = True
        barrier.copies.append(lambda: shared.pending[place[0]].__setitem__(place[1], 0))
        barrier.bytes -= nbytes
        barrier.turn()

    def completed(self, address: int, landing: Landing) -> None:
        """Matrix instructions arrive: what they did can be seen once it was waited for."""
        barrier = self.barrier(address)
        barrier.copies.append(landing)
        barrier.arrived += 1
        barrier.turn()

    def wait(self, address: int, parity: int) -> bool:
        """Whether the phase of that parity has ended; then what came in it is there."""
        barrier = self.barrier(address)
        if barrier.phase & 1 == parity & 1:
            return False
        shared = self.state.shared
        for landing in barrier.landed:
            landing()
        barrier.landed = []
        if barrier.passed and shared.check:
            shared.barrier(np.array(sorted(barrier.passed)))
            barrier.passed = set[int]()
        return True


def barriers(state: State) -> Barriers:
    """The block's only Barriers."""
    if "barriers" not in state.part:
        state.part["barriers"] = Barriers(state)
    return state.part["barriers"]


def _build(state: State, instruction: Instruction, site: int) -> Handler:
    """Builder of all of mbarrier."""
    known = barriers(state)
    words = set(instruction.words[2:]) - _SCOPES
    match instruction.words[1]:
        case "init":
            now = addresses(state, instruction.operands[0])
            count = state.registers.source(instruction.operands[1], np.uint32)
            create = known.create
            return _at_each(state, now, lambda at, who: create(at, int(count[who[0]]), who, site))
        case "inval":
            now = addresses(state, instruction.operands[0])
            return _at_each(state, now, lambda at, who: known.remove(at, who, site))
        case "arrive" if words <= {"expect_tx"}:
            return _arrive(state, instruction, "expect_tx" in words, site)
        case "expect_tx":
            now = addresses(state, instruction.operands[0])
            size = state.registers.source(instruction.operands[1], np.uint32)
            return _at_each(state, now, lambda at, who: _announce(known, at, size[who]))
        case "try_wait" | "test_wait" if words == {"parity"}:
            return _wait(state, instruction, site)
        case _:
            raise Fault(UnsupportedInstruction, f"{instruction.opcode} is new")


def _announce(known: Barriers, at: int, sizes: Array) -> None:
    known.barrier(at).bytes += int(sizes.sum())


def _at_each(state: State, now: Any, act: Any) -> Handler:
    """Act on every address of the active threads, with the threads that name it."""

    def run(mask: Mask) -> None:
        threads = state.active(mask)
        if len(threads):
            places = now()[threads]
            for at in np.unique(places):
                act(int(at), threads[places == at])

    return run


def _arrive(state: State, instruction: Instruction, announces: bool, site: int) -> Handler:
    """arrive _, [address][, count] and arrive.expect_tx _, [address], bytes."""
    known = barriers(state)
    goal, address, *rest = instruction.operands
    if goal != "_" or (rest and not announces):
        raise Fault(UnsupportedInstruction, "the state of an arrival, or several at once")
    size = state.registers.source(rest[0], np.uint32) if announces else None

    def act(at: int, who: Array) -> None:
        nbytes = 0 if size is None else int(size[who[0]])
        known.note(ATOMIC, at, who, site)
        known.arrive(at, who, nbytes, size is None)

    return _at_each(state, addresses(state, address), act)


def _wait(state: State, instruction: Instruction, site: int) -> Handler:
    """try_wait.parity p, [address], parity: where it fails, others should run first."""
    known = barriers(state)
    goal, address, operand = instruction.operands[:3]
    target = state.registers.target(goal, np.bool_)
    now = addresses(state, address)
    parity = state.registers.source(operand, np.uint32)

    def run(mask: Mask) -> None:
        threads = state.active(mask)
        places, phases = now()[threads], parity[threads] & np.uint32(1)
        for at, phase in {(int(a), int(p)) for a, p in zip(places, phases, strict=True)}:
            who = threads[(places == at) & (phases == phase)]
            known.note(ATOMIC, at, who, site)
            target[who] = known.wait(at, phase)
        state.polled = not target[threads].any()

    return run


MBARRIER: Mapping[str, Builder] = {"mbarrier": _build}
"""Builders by the first word of the opcode."""
