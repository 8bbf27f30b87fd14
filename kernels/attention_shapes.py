"""Which tiles flash attention takes: by head size, element type, architecture and queries."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from torch import Tensor

from .launch import Config
from .occupancy import shared_limit

# Tiles of a head of 64 channels in 16 bits; `fitted` cuts them down for wider heads and elements.
CONFIGS = (
    Config({"BM": 128, "BN": 32}, num_warps=4, num_stages=3, archs=("sm_8", "sm_12")),
    Config({"BM": 128, "BN": 128}, num_warps=8, num_stages=2, archs=("sm_8", "sm_12")),
    Config({"BM": 64, "BN": 64}, num_warps=4, num_stages=3, archs=("sm_9", "sm_10")),
    Config({"BM": 128, "BN": 128}, num_warps=8, num_stages=2, archs=("sm_9", "sm_10")),
    Config({"BM": 128, "BN": 64}, num_warps=4, num_stages=2, archs=("gfx9",)),
    Config({"BM": 64, "BN": 32}, num_warps=4, num_stages=1, archs=("gfx11",)),
)

_ALONE = ("sm_8", "sm_12")
"""Where every warp multiplies for itself, with its operands in registers."""

_FULL = 132
"""Programs below which a grid of the larger tiles leaves multiprocessors idle."""


def piece(head: int) -> tuple[int, int]:
    """Two powers of two (the second may be zero) that hold a head of 1 to 256 channels."""
    first = min(128, max(16, 1 << (head.bit_length() - 1)))
    rest = head - first
    return first, max(16, triton.next_power_of_2(rest)) if rest > 0 else 0


def pieces(q: Tensor, v: Tensor, tile: int, arch: str) -> dict[str, int]:
    """The compile-time sizes of both heads; tile: rows.

    Where warps multiply for themselves, Triton gives each its rows only if the result is not wider
    than high; else it splits the keys among them, which costs a reduction through shared memory.
    """
    (d1, d2), (v1, v2) = piece(q.shape[-1]), piece(v.shape[-1])
    if arch.startswith(_ALONE) and v2 == 0 and 64 <= tile < v1 <= 2 * tile:
        v1 = v2 = v1 // 2
    return {"HEAD": q.shape[-1], "D1": d1, "D2": d2, "VALUE": v.shape[-1], "V1": v1, "V2": v2}


def packed_heads(group: int, queries: int, blocks: Tensor | None) -> int:
    """Heads in one tile: all that share keys where queries alone would not fill it."""
    return group if queries <= 32 and blocks is None else 1


def shipped(rows: int, programs: int, head: int, arch: str) -> Config:
    """The default for a call.

    rows: queries of the heads that a tile takes; programs: grid of one tile of each; head: size.
    """
    fit = [config for config in CONFIGS if config.serves(arch)]
    if rows <= 32:
        tile = max(16, triton.next_power_of_2(rows))
        return Config({"BM": tile, "BN": 64}, num_warps=4, num_stages=3)
    few = triton.cdiv(rows, 128) * programs < _FULL
    narrow = arch.startswith(_ALONE) and head <= 64
    return fit[0] if few or narrow else fit[-1]


def fitted(
    config: Config, q: Tensor, k: Tensor, v: Tensor, tf32: bool, arch: str,
    limit: tuple[int, int] | None,
    sloped: bool,
) -> Config:  # fmt: skip
    """A configuration cut down to the head size, the element type and the blocks of a map."""
    tile, width = config.constants["BM"], config.constants["BN"]
    warps, stages = config.num_warps, config.num_stages
    channels = (sum(piece(q.shape[-1])) + sum(piece(v.shape[-1]))) * q.element_size() // 2
    cuts = sum(channels > most for most in _cuts(arch))
    cuts += sloped and cuts > 0 and warps > 4 and arch.startswith(_ALONE)
    gfx11 = arch.startswith("gfx11")
    if q.dtype == torch.float32 and not (tf32 and arch.startswith("sm_")):
        # No tensor core: every thread holds a square of scores.
        tile, width, warps, cuts = min(tile, 16 if gfx11 else 64), 16 if gfx11 else 32, 8, 0
        stages = 3 if arch.startswith("sm_") else stages
    elif gfx11 and cuts:
        # bfloat16 takes registers for its conversions, and these tiles have none to spare.
        small = q.dtype == torch.bfloat16 and channels >= 256
        tile, width, cuts = min(tile, 16 if small else 32), 16, 0
        warps = 4 if small else 8
    elif cuts and warps <= 4 and tile > 64 and arch.startswith("sm_"):
        tile, cuts = tile // 2, cuts - 1
    # A warpgroup's products are cheapest at 64 keys and more, so that those are cut last.
    least = 64 >> max(0, cuts - 1) if arch.startswith(("sm_9", "sm_10")) else 16
    width = max(min(width, least), width >> cuts)
    width = min(width, 64) if arch.startswith(_ALONE) else width
    if limit is not None:
        tile, width = min(tile, limit[0]), min(width, limit[1])
    while stages > 1 and _shared(tile, width, stages, q, v, arch) > shared_limit(arch):
        stages -= 1
    while tile > 16 and _shared(tile, width, stages, q, v, arch) > shared_limit(arch):
        tile //= 2
    return replace(config, constants={"BM": tile, "BN": width}, num_warps=warps, num_stages=stages)


def _cuts(arch: str) -> tuple[int, ...]:
    """Channels of keys and values together, in 16 bits, past which key tiles are halved again.

    Where warps multiply for themselves they hold the sums and a copy of the queries.
    """
    return (128, 319, 511) if arch.startswith(_ALONE) else (128, 320, 640)


def _shared(tile: int, width: int, stages: int, q: Tensor, v: Tensor, arch: str) -> int:
    """Bytes of a tile of queries and of the key and value tiles in flight, at most."""
    head, value = sum(piece(q.shape[-1])), sum(piece(v.shape[-1]))
    if arch.startswith("gfx"):  # one stage of them is in registers, and so are the queries
        tile, stages = 0, max(1, stages - 1)
    return (tile * head + stages * width * (head + value)) * q.element_size()
