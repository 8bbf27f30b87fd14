"""What is in a compiled kernel: registers, spills, and the instructions of its inner loop.

Of NVIDIA's code by the cuobjdump that comes with Triton; of AMD's from the assembly text.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import triton

from ..ir.errors import PlanishError
from .aot import Compiled
from .instruction_kinds import MATRIX, count
from .machine_loops import Instruction, Loop, NaturalLoop, natural_loops


class UnreadableCode(PlanishError):
    """The disassembler failed, or printed what planish does not know to read."""


@dataclass(frozen=True)
class MachineCode:
    """registers of a thread (AMD: vector registers, `accumulators` and `scalars` beside them).

    stack: bytes of local memory of a thread (AMD: scratch). spills: loads and stores of it (AMD:
    vector registers spilled; scalar_spills: scalar ones). waves: that fit on a SIMD unit by the
    compiler's word (AMD). counts: instructions by kind, see instruction_kinds. loop: the inner loop
    with the most matrix instructions, () where no loop has any; loop_counts: its kinds; always: of
    the loop what every trip runs.
    """

    arch: str
    registers: int
    stack: int
    spills: int
    accumulators: int
    scalars: int
    scalar_spills: int
    waves: int
    code: Loop
    counts: Mapping[str, int]
    loop: Loop
    loop_counts: Mapping[str, int]
    always: Loop

    @property
    def matrix(self) -> dict[str, int]:
        """Matrix instructions of the inner loop by family."""
        return {k: self.loop_counts[k] for k in MATRIX if k in self.loop_counts}


def read_machine_code(compiled: Compiled) -> MachineCode:
    """Raises UnreadableCode."""
    nvidia = compiled.arch.startswith("sm_")
    text = _cuobjdump(compiled) if nvidia else compiled.assembly
    code = sass(text, compiled.name) if nvidia else gcn(text)
    found = inner_loop(code, nvidia)
    loop = _picked(code, found.places)
    counts = count(code, nvidia)
    figures = _nvidia(text, compiled.name, counts) if nvidia else _amd(text)
    return MachineCode(
        arch=compiled.arch,
        code=code,
        counts=counts,
        loop=loop,
        loop_counts=count(loop, nvidia),
        always=_picked(code, found.always),
        **figures,
    )


def inner_loop(code: Loop, nvidia: bool) -> NaturalLoop:
    """The loop with the most matrix instructions among those that hold no other such loop."""
    loops = [(loop, _matrix(code, loop.places, nvidia)) for loop in natural_loops(code)]
    busy = [(loop, number) for loop, number in loops if number]
    inner = [(a, n) for a, n in busy if not any(b.places < a.places for b, _ in busy)]
    if not inner:
        return NaturalLoop(frozenset(), frozenset())
    return max(inner, key=lambda one: (one[1], -len(one[0].places)))[0]


def _picked(code: Loop, places: frozenset[int]) -> Loop:
    return tuple(code[place] for place in sorted(places))


def _matrix(code: Loop, places: frozenset[int], nvidia: bool) -> int:
    counts = count((code[place] for place in places), nvidia)
    return sum(counts.get(kind, 0) for kind in (*MATRIX, "double mma"))


_SASS_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")
_SASS_ENDS = ("BRA", "EXIT", "RET", "JMP", "BRX", "JMX")


def sass(text: str, name: str) -> Loop:
    """The instructions in what cuobjdump prints of a kernel. Raises UnreadableCode."""
    lines = [match.groups() for match in _SASS_LINE.finditer(text)]
    place = {int(address, 16): i for i, (address, *_) in enumerate(lines)}
    if not lines or len(place) != len(lines):
        raise UnreadableCode(
            f"the machine code of {name} cannot be read",
            expected="one function in SASS",
            found=text[:200],
        )
    return tuple(_sass(guard, name, rest.strip(), place) for _, guard, name, rest in lines)


def _sass(guard: str | None, name: str, rest: str, place: dict[int, int]) -> Instruction:
    stem = name.split(".", 1)[0]
    jump = None
    if stem in ("BRA", "JMP"):
        target = re.search(r"(0x[0-9a-f]+)\W*$", rest)
        jump = place.get(int(target.group(1), 16)) if target else None
    # BRA has its condition before it, or as its first operand: BRA.U !UP0, 0x130.
    ends = stem in _SASS_ENDS and not guard and "," not in rest
    return Instruction(name, f"{name} {rest}".strip(), jump, ends)


_GCN_LABEL = re.compile(r"^(\.?\w+):")
_GCN_LINE = re.compile(r"^\s+([a-z]\w+)(?:\s+([^;]*))?")


def gcn(assembly: str) -> Loop:
    """The instructions in the assembly text of an AMD kernel."""
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for line in assembly.split(".section\t.rodata", 1)[0].splitlines():
        if label := _GCN_LABEL.match(line):
            labels[label.group(1)] = len(lines)
        elif found := _GCN_LINE.match(line):
            lines.append((found.group(1), (found.group(2) or "").strip()))
    return tuple(
        Instruction(
            name,
            f"{name} {rest}".strip(),
            jump=_inside(labels.get(rest), lines) if "branch" in name else None,
            ends=name in ("s_branch", "s_endpgm", "s_setpc_b64"),
        )
        for name, rest in lines
    )


def _inside(place: int | None, lines: list[tuple[str, str]]) -> int | None:
    return place if place is not None and place < len(lines) else None


def _nvidia(text: str, name: str, counts: Mapping[str, int]) -> dict[str, int]:
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise UnreadableCode(f"cuobjdump does not say what {name} uses", found=text[-200:])
    return {
        "registers": int(found.group(1)),
        "stack": int(found.group(2)),
        "spills": counts.get("ldl", 0) + counts.get("stl", 0),
        "accumulators": 0,
        "scalars": 0,
        "scalar_spills": 0,
        "waves": 0,
    }


def _amd(assembly: str) -> dict[str, int]:
    names = {
        "registers": "vgpr_count",
        "stack": "private_segment_fixed_size",
        "spills": "vgpr_spill_count",
        "accumulators": "agpr_count",
        "scalars": "sgpr_count",
        "scalar_spills": "sgpr_spill_count",
    }
    found = {k: re.search(rf"\.{name}:\s+(\d+)", assembly) for k, name in names.items()}
    found["waves"] = re.search(r"; Occupancy:\s+(\d+)", assembly)
    return {k: int(match.group(1)) if match else 0 for k, match in found.items()}


def _cuobjdump(compiled: Compiled) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.binary)
        asked = [tool, "-sass", "--dump-resource-usage", cubin]
        ended = subprocess.run(asked, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise UnreadableCode(
            f"cuobjdump cannot read {compiled.name} for {compiled.arch}", found=ended.stderr[-500:]
        )
    return ended.stdout
