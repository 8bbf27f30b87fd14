"""Runs the threads of a block: together while they agree, by the lowest instruction when not.

Diverged threads take turns: those at the lowest instruction run until they reach others. Threads
at a barrier wait for the rest; threads that poll in vain let others go first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ptx_decode import handlers
from .ptx_errors import EndlessLoop, Fault, UnsupportedInstruction
from .ptx_parse import Instruction
from .ptx_state import Handler, Mask, State

Array = NDArray[Any]

_PLAIN, _BRANCH, _RETURN, _BARRIER = range(4)
_PARKED = 1 << 40


class Machine:
    """The program bound to one block of threads; `run` executes one program of the grid."""

    def __init__(self, state: State, limit: int) -> None:
        self.state, self.limit = state, limit
        self.instructions = state.program.instructions
        self.counts = [0] * len(self.instructions)
        self.steps: list[tuple[int, Handler, Array | None, bool, int]] = []
        for instruction, action in zip(self.instructions, handlers(state), strict=True):
            try:
                self.steps.append(self._bind(instruction, action))
            except Fault as fault:
                raise fault.at(instruction.place) from None
        self.executed = 0

    def _bind(
        self, instruction: Instruction, action: Handler | None
    ) -> tuple[int, Handler, Array | None, bool, int]:
        """(kind, handler, guard, negated, the goal of a branch or the threads of a barrier)."""
        guard = None
        if instruction.guard is not None:
            guard = self.state.registers.source(instruction.guard, np.bool_)
        kind, goal = _PLAIN, 0
        if action is None:
            word = instruction.words[0]
            if word == "bra":
                kind, goal = _BRANCH, self._label(instruction.operands[0])
            elif word in ("ret", "exit"):
                kind = _RETURN
            else:
                kind, goal = _BARRIER, self._barrier_size(instruction)
        return kind, action or _never, guard, instruction.negated, goal

    def _label(self, name: str) -> int:
        if name not in self.state.program.labels:
            raise Fault(UnsupportedInstruction, f"there is no label {name}")
        return self.state.program.labels[name]

    def _barrier_size(self, instruction: Instruction) -> int:
        """Threads that the barrier waits for; 0 stands for all."""
        words = set(instruction.words[1:]) - {"sync", "aligned", "cta"}
        if words or any(o.startswith("%") for o in instruction.operands):
            raise Fault(UnsupportedInstruction, f"{instruction.text} is new")
        return int(instruction.operands[1], 0) if instruction.operands[1:] else 0

    def run(self, block: Sequence[int], grid: Sequence[int], number: int) -> None:
        """Execute the program at `block` of the grid; number: its place in the order of launch."""
        self.state.start(block, grid, number)
        self.budget = self.limit
        self.at = 0
        try:
            self._together(0)
            self.state.end()
        except Fault as fault:
            here = f"{self.instructions[self.at].place}; program {tuple(block)}"
            raise fault.at(here) from None
        self.executed += self.limit - self.budget

    def opcodes(self) -> Counter[str]:
        """How often each opcode was executed."""
        found = Counter[str]()
        for instruction, count in zip(self.instructions, self.counts, strict=True):
            if count:
                found[instruction.opcode] += count
        return found

    def _together(self, at: int) -> None:
        """Run while all threads are at the same instruction."""
        steps, counts, end = self.steps, self.counts, len(self.steps)
        budget = self.budget
        while at < end:
            kind, action, guard, negated, goal = steps[at]
            counts[at] += 1
            budget -= 1
            mask: Mask = True
            if guard is not None:
                mask = ~guard if negated else guard
                if mask.all():
                    mask = True
                elif not mask.any():
                    at += 1
                    continue
            if kind == _PLAIN:
                self.at = at
                action(mask)
                at += 1
                if self.state.polled:
                    self._in_vain(mask)
                continue
            if budget < 0:
                self.at = at
                self._exhausted()
            self.budget = budget
            if mask is not True or (kind == _BARRIER and 0 < goal < self.state.threads):
                at = self._apart(at, mask, kind, goal)
                budget = self.budget
            elif kind == _BRANCH:
                at = goal
            elif kind == _RETURN:
                at = end
            else:
                self.at = at
                self.state.shared.barrier()
                at += 1
        self.budget = budget

    def _exhausted(self) -> None:
        raise Fault(
            EndlessLoop,
            "the program executes more instructions than it may",
            expected=f"at most {self.limit}",
        )

    def _in_vain(self, mask: Mask) -> None:
        """All threads poll at once: if it failed for all of them, it fails for ever."""
        self.state.polled = False
        if mask is True:
            raise Fault(EndlessLoop, "all threads wait for a phase that nobody will end")

    # --- diverged threads

    def _apart(self, at: int, mask: Mask, kind: int, goal: int) -> int:
        """Run from an instruction that parts the threads until they agree again."""
        places = np.full(self.state.threads, at, np.int64)
        self.waiting: dict[tuple[int, int], Array] = {}
        self.resting = np.zeros(self.state.threads, bool)
        self.moved = True
        self._part(places, np.ones(self.state.threads, bool), at, mask, kind, goal)
        while True:
            ready = (places < _PARKED) & ~self.resting
            low = int(places[ready].min()) if ready.any() else _PARKED
            if low >= len(self.steps):
                if (places == len(self.steps)).all():
                    return len(self.steps)
                self._wake(places)
                continue
            group = ready & (places == low)
            if group.all():
                return low
            others = places[~group & (places > low)]
            self._segment(places, group, low, int(others.min()) if len(others) else _PARKED)

    def _wake(self, places: Array) -> None:
        """Nobody is ready: those that polled in vain try again, if anything has happened since."""
        if not self.resting.any() or not self.moved:
            self._stuck(places)
        self.resting[:] = False
        self.moved = False

    def _segment(self, places: Array, group: Array, at: int, horizon: int) -> None:
        """Run a group of threads until it meets others, parts, waits or polls in vain."""
        while at < min(horizon, len(self.steps)):
            kind, action, guard, negated, goal = self.steps[at]
            self.counts[at] += 1
            self.budget -= 1
            self.at = at
            mask = group
            if guard is not None:
                mask = group & (~guard if negated else guard)
                if not mask.any():
                    at += 1
                    continue
            if self.budget < 0:
                self._exhausted()
            if kind != _PLAIN:
                self._part(places, group, at, mask, kind, goal)
                return
            action(mask)
            if self.state.polled:
                self.state.polled = False
                places[group] = at
                self.resting |= group
                return
            self.moved = True
            at += 1
        places[group] = at

    def _part(self, places: Array, group: Array, at: int, mask: Mask, kind: int, goal: int) -> None:
        """Move a group on from a branch, a return or a barrier that `mask` of it takes."""
        taken = group if mask is True else mask
        places[group] = at + 1
        if kind == _BRANCH:
            places[taken] = goal
        elif kind == _RETURN:
            places[taken] = len(self.steps)
            self._release(places)
        else:
            self._arrive(places, taken, at, goal)

    def _arrive(self, places: Array, taken: Array, at: int, size: int) -> None:
        name = self.instructions[at].operands[0] if self.instructions[at].operands else "0"
        key = (int(name, 0), size)
        places[taken] = _PARKED + at + 1
        waiting = self.waiting.get(key)
        self.waiting[key] = taken.copy() if waiting is None else waiting | taken
        self._release(places)

    def _release(self, places: Array) -> None:
        """Let the threads of complete barriers go; threads that have ended count as arrived."""
        ended = places == len(self.steps)
        for key, waiting in list(self.waiting.items()):
            size = key[1] or self.state.threads - int(ended.sum())
            if int(waiting.sum()) < size:
                continue
            del self.waiting[key]
            places[waiting] -= _PARKED
            everyone = bool((waiting | ended).all())
            warps = np.unique(np.flatnonzero(waiting) // 32 + 1)
            self.state.shared.barrier(None if everyone else warps)

    def _stuck(self, places: Array) -> None:
        waiting = self.resting | (places >= _PARKED)
        thread = int(waiting.argmax())
        place = int(places[thread])
        self.at = place - _PARKED - 1 if place >= _PARKED else place
        raise Fault(
            EndlessLoop, "threads wait at a barrier that the others do not reach", thread=thread
        )


def _never(mask: Mask) -> None:
    del mask
