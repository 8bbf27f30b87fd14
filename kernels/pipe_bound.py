"""How fast the inner loop could be if nothing ever waited: cycles a trip by execution pipe.

Only throughput is modelled, no latency, no cache, no memory: an upper bound, never a prediction.
Results per clock are those of the table "Throughput of Native Arithmetic Instructions" in NVIDIA's
CUDA C++ Programming Guide; which instruction goes to which pipe follows Jia et al. 2018 (Dissecting
NVIDIA Volta). Where these leave a doubt, the faster is assumed. Only what every trip runs counts,
and what wgmma reads from shared memory does not. Nothing was compared with a GPU.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from .machine_code import MachineCode
from .machine_loops import Loop
from .peaks import LABEL

_WARP = 32
_WARP_GROUP = 4


@dataclass(frozen=True)
class Multiprocessor:
    """Of one GPU. lanes: results a clock of the pipes; tensor: multiply-adds a clock by type;
    shared: bytes a clock; clock: Hz, the one that the published tensor peak implies.
    """

    gpu: str
    count: int
    clock: float
    lanes: Mapping[str, int]
    tensor: Mapping[str, int]
    shared: int = 128
    schedulers: int = 4


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(
        "A100",
        108,
        1.41e9,
        {"fma": 64, "alu": 64, "half": 128, "special": 16, "convert": 16},
        {"f16": 1024, "tf32": 512, "s8": 2048},
    ),
    "sm_90": Multiprocessor(
        "H100",
        132,
        1.83e9,
        {"fma": 128, "alu": 64, "half": 128, "special": 16, "convert": 64},
        {"f16": 2048, "tf32": 1024, "s8": 4096, "f8": 4096},
    ),
}

_PIPES = {
    "fma": r"FFMA|FADD|FMUL|IMAD|IDP",
    "alu": r"IADD3?|VIADD|VIADDMNMX|LOP3|PLOP3|SHF|SHL|SHR|ISETP|IMNMX|VIMNMX|PRMT|LEA|SEL|FSEL|"
    r"FMNMX|FSETP|FSET|FCHK|BMSK|SGXT|IABS|I2FP|F2FP|VABSDIFF|POPC",
    "half": r"HADD2|HMUL2|HFMA2|HMNMX2|HSETP2",
    "special": r"MUFU",
    "convert": r"I2F|F2F|F2I|I2I|FRND",
}
_PIPE = {pipe: re.compile(rf"(?:{names})(?=\.|$)") for pipe, names in _PIPES.items()}

_BY_WARP = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "16832": 16 * 8 * 32, "16864": 16 * 8 * 64}
_MMA = re.compile(r"([HIQ])MMA\.(\d+)")
_WGMMA = re.compile(r"([HIQ])GMMA\.(\d+)x(\d+)x(\d+)")
_SHARED = re.compile(r"(LDSM|LDS|STSM|STS|LDGSTS)(?=\.|$)")


@dataclass(frozen=True)
class PipeBound:
    """cycles: that one trip of a block keeps each pipe of a multiprocessor busy; limiter: the
    busiest. rate: operations a second of the whole GPU that the loop cannot exceed; share: of the
    tensor cores' peak.
    """

    gpu: str
    cycles: Mapping[str, float]
    limiter: str
    rate: float
    share: float
    label: str = LABEL


def pipe_bound(code: MachineCode, threads: int) -> PipeBound | None:
    """Of the inner loop of a kernel with blocks of `threads` threads.

    None for an architecture without figures, and for a kernel without matrix instructions in a
    loop: there `ideal_time` is the bound.
    """
    unit = MULTIPROCESSORS.get(code.arch)
    multiplied = _multiply_adds(code.always, threads // _WARP)
    if unit is None or not multiplied:
        return None
    tensor = sum(number / unit.tensor[kind] for kind, number in multiplied.items())
    cycles = {**_busy(code.always, unit, threads // _WARP), "tensor": tensor}
    limiter = max(cycles, key=lambda pipe: cycles[pipe])
    trips = unit.clock / cycles[limiter]
    return PipeBound(
        unit.gpu,
        cycles,
        limiter,
        rate=2 * sum(multiplied.values()) * trips * unit.count,
        share=tensor / cycles[limiter],
    )


def _busy(loop: Loop, unit: Multiprocessor, warps: int) -> dict[str, float]:
    cycles = {"issue": len(loop) * warps / unit.schedulers}
    for pipe, pattern in _PIPE.items():
        number = sum(1 for instruction in loop if pattern.match(instruction.opcode))
        cycles[pipe] = number * warps * _WARP / unit.lanes[pipe]
    nbytes = sum(_shared_bytes(instruction.opcode) for instruction in loop)
    cycles["shared memory"] = nbytes * warps / unit.shared
    return cycles


def _multiply_adds(loop: Loop, warps: int) -> Counter[str]:
    """Of a block in one trip, by type; each warp or group of four warps runs every instruction."""
    found: Counter[str] = Counter()
    for opcode in (instruction.opcode for instruction in loop):
        if match := _WGMMA.match(opcode):
            m, n, k = (int(size) for size in match.groups()[1:])
            found[_type(match.group(1), opcode)] += m * n * k * warps // _WARP_GROUP
        elif (match := _MMA.match(opcode)) and match.group(2) in _BY_WARP:
            found[_type(match.group(1), opcode)] += _BY_WARP[match.group(2)] * warps
    return found


def _type(letter: str, opcode: str) -> str:
    if letter == "H":
        return "tf32" if "TF32" in opcode else "f16"
    return "s8" if letter == "I" else "f8"


def _shared_bytes(opcode: str) -> int:
    """That a warp moves; any access takes the 128 bytes of one pass at least."""
    if not _SHARED.match(opcode):
        return 0
    if opcode.startswith(("LDSM", "STSM")):
        matrices = re.search(r"\.(4|2)(?:\.|$)", opcode)
        return 128 * int(matrices.group(1)) if matrices else 128
    if re.search(r"\.128(?:\.|$)", opcode):
        return 512
    return 256 if re.search(r"\.64(?:\.|$)", opcode) else 128
