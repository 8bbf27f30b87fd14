"""How many blocks of a kernel fit on one multiprocessor, and what it is that limits them.

The constants of NVIDIA's architectures are those of the CUDA C++ Programming Guide, appendix
"Compute Capabilities", table "Technical Specifications per Compute Capability": registers, shared
memory, warps and blocks per multiprocessor. Registers are given to a warp in units of 256, and each
block takes 1 KB of shared memory for the system (Tuning Guides of the Ampere, Hopper and Blackwell
architectures, section "Occupancy"). They were not compared with a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..ir.errors import UnknownName

KB = 1024


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor. shared, shared_block: bytes for all blocks, bytes for one block."""

    shared: int
    shared_block: int
    warps: int
    blocks: int
    registers: int = 64 * KB
    registers_thread: int = 255


LIMITS = {
    "sm_80": Limits(164 * KB, 163 * KB, warps=64, blocks=32),
    "sm_86": Limits(100 * KB, 99 * KB, warps=48, blocks=16),
    "sm_89": Limits(100 * KB, 99 * KB, warps=48, blocks=24),
    "sm_90": Limits(228 * KB, 227 * KB, warps=64, blocks=32),
    "sm_100": Limits(228 * KB, 227 * KB, warps=64, blocks=32),
    "sm_120": Limits(100 * KB, 99 * KB, warps=48, blocks=24),
}

LOCAL_DATA_SHARE = 64 * KB
"""Bytes that one workgroup may have on gfx942 and gfx1100 (AMD's CDNA 3 and RDNA 3 manuals)."""

_WARP = 32
_REGISTER_UNIT = 256
_SHARED_UNIT = 128
_SHARED_SYSTEM = KB
_PARTITIONS = 4


class UnknownArch(UnknownName):
    kind = "architecture"


def limits_of(arch: str) -> Limits:
    """Raises UnknownArch."""
    if arch not in LIMITS:
        raise UnknownArch.named(arch, LIMITS)
    return LIMITS[arch]


def shared_limit(arch: str) -> int:
    """Bytes of shared memory that one block may have. Raises UnknownArch."""
    return LOCAL_DATA_SHARE if arch.startswith("gfx") else limits_of(arch).shared_block


@dataclass(frozen=True)
class Occupancy:
    """blocks and warps resident on a multiprocessor at once; fraction of the warps it could have.

    limiters: "registers", "shared memory", "warps", "blocks": whichever bind.
    """

    blocks: int
    warps: int
    fraction: float
    limiters: tuple[str, ...]


def occupancy(arch: str, registers: int, shared: int, threads: int) -> Occupancy:
    """Of blocks of `threads` threads with `registers` each and `shared` bytes, on an NVIDIA arch.

    A kernel that fits in no way has 0 blocks. Raises UnknownArch.
    """
    limits = limits_of(arch)
    warps = math.ceil(threads / _WARP)
    fits = {
        "registers": _blocks_by_registers(limits, registers, warps),
        "shared memory": _blocks_by_shared(limits, shared),
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
    }
    blocks = min(fits.values())
    binding = tuple(name for name, count in fits.items() if count == blocks)
    return Occupancy(blocks, blocks * warps, blocks * warps / limits.warps, binding)


def _blocks_by_registers(limits: Limits, registers: int, warps: int) -> int:
    if registers > limits.registers_thread:
        return 0
    of_a_warp = _round_up(max(registers, 1) * _WARP, _REGISTER_UNIT)
    # Each of the four partitions has a quarter of the registers and its own warps.
    per_partition = limits.registers // _PARTITIONS // of_a_warp
    return per_partition * _PARTITIONS // warps


def _blocks_by_shared(limits: Limits, shared: int) -> int:
    if shared > limits.shared_block:
        return 0
    return limits.shared // _round_up(shared + _SHARED_SYSTEM, _SHARED_UNIT)


def _round_up(value: int, unit: int) -> int:
    return math.ceil(value / unit) * unit
