"""Resident blocks: worked by hand from the limits of the programming guide."""

from __future__ import annotations

import pytest
from planish.kernels.occupancy import LIMITS, UnknownArch, occupancy, shared_limit

KB = 1024


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "blocks", "limiters"),
    [
        # 168 registers: 168 * 32 = 5376 a warp, 3 in a partition of 16384, so 12 warps, 3 blocks;
        # 40 KB and 1 KB of the system go 4 times into 164 KB.
        ("sm_80", 168, 40 * KB, 128, 3, ("registers",)),
        # 32 registers: 1024 a warp, 64 warps; 1024 threads are 32 warps.
        ("sm_80", 32, 0, 1024, 2, ("registers", "warps")),
        ("sm_89", 32, 0, 1024, 1, ("warps",)),
        # 255 registers: 8160 a warp, rounded to 8192, 2 in a partition: 8 warps.
        ("sm_90", 255, 0, 256, 1, ("registers",)),
        ("sm_90", 255, 0, 512, 0, ("registers",)),
        # 113 KB + 1 KB go twice into 228 KB, a byte more only once.
        ("sm_90", 32, 113 * KB, 128, 2, ("shared memory",)),
        ("sm_90", 32, 113 * KB + 1, 128, 1, ("shared memory",)),
        ("sm_80", 16, 0, 32, 32, ("blocks",)),
        ("sm_89", 16, 0, 32, 24, ("blocks",)),
        ("sm_120", 32, 99 * KB, 128, 1, ("shared memory",)),
        ("sm_120", 32, 99 * KB + 1, 128, 0, ("shared memory",)),
    ],
)
def test_blocks(
    arch: str, registers: int, shared: int, threads: int, blocks: int, limiters: tuple[str, ...]
) -> None:
    found = occupancy(arch, registers, shared, threads)
    assert (found.blocks, found.limiters) == (blocks, limiters)
    assert found.warps == blocks * threads // 32
    assert found.fraction == found.warps / LIMITS[arch].warps


def test_the_limit_of_a_block() -> None:
    assert [shared_limit(a) // KB for a in ("sm_80", "sm_89", "sm_90", "gfx942")] == [
        163,
        99,
        227,
        64,
    ]
    with pytest.raises(UnknownArch):
        shared_limit("sm_81")
