"""Broken copies of PTX, one mistake each, to see that executing them tells.

The mistakes are those that a compiler or an author could make and that a GPU might forgive by luck:
a wait or a barrier that is not there, exchanged operands, a layout that two sides read differently,
a mask that is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_MOST_BARRIERS = 24
_SWIZZLES = 2
_NAME = re.compile(r"%[\w$]+")
_STATEMENT = re.compile(r"[^;{}\n][^;\n]*;")
_SHARED_ACCESS = re.compile(r"\b(?:ld|st)\.shared|\bldmatrix|\bstmatrix|\bcp\.async\.c[ag]")
_BARRIER = r"\b(?:bar|barrier)\.sync\b[^;]*;"
_HAPPENS = re.compile(
    r"\.shared|\bldmatrix|\bstmatrix|\bcp\.async|\bwgmma|\btcgen05|\bmbarrier|\bfence|\bst\.|\bld\."
    r"|\batom|\bred\.|\bbra\b|^\s*[$\w]+:",
    re.M,
)
"""What a barrier could order, and where control flow meets."""
_DERIVES = re.compile(r"\s*(?:add|or|xor|mov|mad|shl|cvt)\b")
_WAIT_LOOP = re.compile(
    r"mbarrier\.try_wait[^;]*;\s*(?:\.loc[^\n]*\n\s*)*@!\s*%?\w+\s+bra(?:\.uni)?\s+\w+\s*;"
)


@dataclass(frozen=True)
class Mutant:
    """A broken copy. name: the mistake, with a number where there are several places for it."""

    name: str
    ptx: str


def mutants(ptx: str) -> list[Mutant]:
    """Every broken copy that the PTX has a place for."""
    found = [
        *_dropped(ptx, "cp.async.wait_group dropped", r"\bcp\.async\.wait_(?:group|all)\b[^;]*;"),
        *_off_by_one(ptx, "cp.async.wait_group"),
        *_barriers(ptx),
        *_swapped(ptx),
        *_swizzles(ptx),
        *_masks(ptx),
        *_dropped(ptx, "mbarrier wait dropped", _WAIT_LOOP.pattern),
        *_dropped(ptx, "wgmma.wait_group dropped", r"\bwgmma\.wait_group[^;]*;"),
        *_off_by_one(ptx, "wgmma.wait_group.sync.aligned"),
        *_dropped(
            ptx, "cp.async.bulk.wait_group dropped", r"\bcp\.async\.bulk\.wait_group\s[^;]*;"
        ),
        *_dropped(ptx, "fence.proxy.async dropped", r"\bfence\.proxy\.async[^;]*;"),
    ]
    return [mutant for mutant in found if mutant.ptx != ptx]


def _dropped(ptx: str, name: str, pattern: str) -> Iterator[Mutant]:
    """All places at once: one alone may be followed by another that makes up for it."""
    guarded = r"(?:@!?%\w+\s+)?" + pattern
    yield Mutant(name, re.sub(guarded, "", ptx))


def _off_by_one(ptx: str, opcode: str) -> Iterator[Mutant]:
    """Every wait leaves one group more under way than it may."""

    def more(match: re.Match[str]) -> str:
        return f"{match.group(1)}{int(match.group(2), 0) + 1};"

    pattern = rf"(\b{re.escape(opcode)}\s+)(\w+)\s*;"
    short = ".".join(opcode.split(".")[:3]).removesuffix(".sync")
    yield Mutant(f"{short} off by one", re.sub(pattern, more, ptx))


def _barriers(ptx: str) -> Iterator[Mutant]:
    """Each barrier, or run of barriers between which nothing happens: one of a run says it all."""
    places = list(re.finditer(_BARRIER, ptx))
    runs: list[list[int]] = []
    for number, place in enumerate(places):
        between = ptx[places[number - 1].end() : place.start()] if number else "label:"
        if runs and not _HAPPENS.search(between):
            runs[-1].append(number)
        else:
            runs.append([number])
    for run in runs[:_MOST_BARRIERS]:
        first, last = run[0] + 1, run[-1] + 1
        name = f"bar.sync {first}" if first == last else f"bar.sync {first} to {last}"
        broken = ptx
        for number in reversed(run):
            broken = broken[: places[number].start()] + broken[places[number].end() :]
        yield Mutant(f"{name} dropped", broken)
    if len(runs) > 1:
        yield Mutant("every bar.sync dropped", re.sub(_BARRIER, "", ptx))


def _swapped(ptx: str) -> Iterator[Mutant]:
    """Two registers of an operand exchanged in the first instruction of a kind."""
    register = r"(%[\w$]+)(\s*,\s*)(%[\w$]+)"
    exchange: Callable[[re.Match[str]], str] = lambda m: m[1] + m[4] + m[3] + m[2]  # noqa: E731
    for name, before in (
        ("mma operands swapped", r"(\bmma\.sync[^;{]*\{[^}]*\}\s*,\s*\{\s*)"),
        ("ldmatrix registers swapped", r"(\bldmatrix[^;{]*\{\s*)"),
        ("wgmma operands swapped", r"(\bwgmma\.mma_async[^;{]*\{[^}]*\}\s*,\s*\{?\s*)"),
    ):
        yield Mutant(name, re.sub(before + register, exchange, ptx, count=1))


def _swizzles(ptx: str) -> Iterator[Mutant]:
    """xor becomes or where shared addresses are computed from it: one side of a layout breaks."""
    body = ptx[: ptx.rfind("\n}")]
    number = 0
    for place in re.finditer(r"\bxor(\.b32\s+(%[\w$]+)\s*,[^;]*;)", body):
        if number < _SWIZZLES and _becomes_shared_address(body[place.end() :], place.group(2)):
            number += 1
            broken = ptx[: place.start()] + "or" + ptx[place.start() + 3 :]
            yield Mutant(f"swizzle {number} broken (xor to or)", broken)


def _becomes_shared_address(rest: str, register: str) -> bool:
    """Whether a value computed from the register is an address of shared memory."""
    derived = {register}
    for statement in _STATEMENT.findall(rest):
        names = _NAME.findall(statement)
        if _SHARED_ACCESS.search(statement):
            address = re.search(r"\[([^\]]*)\]", statement)
            if address and derived & set(_NAME.findall(address.group(1))):
                return True
        elif _DERIVES.match(statement) and derived & set(names[1:]):
            derived.add(names[0])
    return False


def _masks(ptx: str) -> Iterator[Mutant]:
    """Accesses of global memory that ignore their masks: all loads, stores or atomics."""
    for name, opcode in (
        ("load masks dropped", r"ld\.global"),
        ("store masks dropped", r"st\.global"),
        ("atomic masks dropped", r"(?:atom|red)\.global"),
    ):
        broken = re.sub(rf"@!?%[\w$]+(\s+{opcode})", r"\1", ptx)
        if opcode.startswith("ld"):
            copies = r"(\bcp\.async\.c[ag]\.[^;]*,\s*(0x[0-9a-f]+|\d+)\s*),\s*%[\w$]+\s*;"
            broken = re.sub(copies, r"\1;", broken)
        yield Mutant(name, broken)
