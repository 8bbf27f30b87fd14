"""The loops of machine code: natural loops of its control-flow graph (Aho and Ullman 1977, ch. 12).

A branch backwards alone does not make a loop: compilers put the slow path of a wait behind the end
of the kernel and jump back from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """opcode with its suffixes, the whole text; jump: place in the list where it may go on.

    ends: the next instruction is not reached from here.
    """

    opcode: str
    text: str
    jump: int | None = None
    ends: bool = False


Loop = tuple[Instruction, ...]


@dataclass(frozen=True)
class NaturalLoop:
    """places: of its instructions; always: of those that every trip runs."""

    places: frozenset[int]
    always: frozenset[int]


def natural_loops(code: Sequence[Instruction]) -> list[NaturalLoop]:
    """The loops; those with one head are one."""
    starts = _block_starts(code)
    blocks = [range(a, b) for a, b in zip(starts, [*starts[1:], len(code)], strict=True)]
    follow = _successors(code, starts, blocks)
    dominators = _dominators(follow)
    bodies: dict[int, set[int]] = {}
    always: dict[int, set[int]] = {}
    for block, after in enumerate(follow):
        for head in after:
            if block in dominators and head in dominators[block]:
                bodies.setdefault(head, {head}).update(_body(follow, head, block))
                always[head] = always.get(head, bodies[head]) & dominators[block]

    def places(chosen: set[int]) -> frozenset[int]:
        return frozenset(place for block in chosen for place in blocks[block])

    return [NaturalLoop(places(b), places(b & always[head])) for head, b in bodies.items()]


def _block_starts(code: Sequence[Instruction]) -> list[int]:
    starts = {0} if code else set[int]()
    for place, instruction in enumerate(code):
        if instruction.jump is not None:
            starts.add(instruction.jump)
        if (instruction.jump is not None or instruction.ends) and place + 1 < len(code):
            starts.add(place + 1)
    return sorted(starts)


def _successors(
    code: Sequence[Instruction], starts: list[int], blocks: list[range]
) -> list[list[int]]:
    block_at = {start: block for block, start in enumerate(starts)}
    follow: list[list[int]] = []
    for block, places in enumerate(blocks):
        last = code[places[-1]]
        after = [] if last.jump is None else [block_at[last.jump]]
        if not last.ends and block + 1 < len(blocks):
            after.append(block + 1)
        follow.append(after)
    return follow


def _dominators(follow: list[list[int]]) -> dict[int, set[int]]:
    """For every block reached from the first: the blocks on every way to it, itself included."""
    reached = _reached(follow)
    before = _predecessors(follow)
    dominators = {block: set(reached) for block in reached}
    if reached:
        dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in reached[1:]:
            ways = [dominators[b] for b in before[block] if b in dominators]
            new = set[int].intersection(*ways) | {block}
            changed |= new != dominators[block]
            dominators[block] = new
    return dominators


def _reached(follow: list[list[int]]) -> list[int]:
    seen, todo = dict.fromkeys([0] if follow else []), [0] if follow else []
    while todo:
        for after in follow[todo.pop()]:
            if after not in seen:
                seen[after] = None
                todo.append(after)
    return list(seen)


def _predecessors(follow: list[list[int]]) -> list[list[int]]:
    before: list[list[int]] = [[] for _ in follow]
    for block, after in enumerate(follow):
        for other in after:
            before[other].append(block)
    return before


def _body(follow: list[list[int]], head: int, tail: int) -> set[int]:
    """The blocks from which the tail is reached without passing the head."""
    before = _predecessors(follow)
    body, todo = {head, tail}, [tail] if tail != head else []
    while todo:
        for block in before[todo.pop()]:
            if block not in body:
                body.add(block)
                todo.append(block)
    return body
