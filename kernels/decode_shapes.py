"""What the shapes of an attention over a cache decide: its tiles, its splits, what is refused.

Nothing here reads a number of a tensor.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from .launch import Config

PROCESSORS = {
    "sm_80": 108,
    "sm_89": 128,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 170,
    "gfx942": 304,
    "gfx1100": 96,
}
"""Multiprocessors of the largest card of an architecture; only how many splits depends on it."""

_WIDE = ("sm_", "gfx9")
_ROOMY = ("sm_8", "sm_9", "sm_10", "gfx9")
CONFIGS = (
    Config({"BN": 64}, num_warps=4, num_stages=2, archs=_WIDE),
    Config({"BN": 32}, num_warps=4, num_stages=2, archs=_ROOMY),
    Config({"BN": 16}, num_warps=4, num_stages=2, archs=_ROOMY),
    # With four warps the assembler of sm_120 leaves a register or two in local memory.
    Config({"BN": 32}, num_warps=8, num_stages=2, archs=("sm_12",)),
    Config({"BN": 16}, num_warps=8, num_stages=1, archs=("gfx11",)),
)
_MOST_SPLITS = 64
MOST_ROWS = 64
JOINED = 8
_ALL_TOKENS = 1 << 30
_TILE_BYTES = 48 * 1024
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_NO_E4M3 = ("sm_80", "gfx")


def default_config(head: int, value_head: int, element: int, arch: str) -> Config:
    """The widest tile whose keys and values fit beside those of the next step."""
    served = [config for config in CONFIGS if config.serves(arch)]
    for config in served[:-1]:
        if config.constants["BN"] * (head + value_head) * element <= _TILE_BYTES:
            return config
    return served[-1]


def visible_tokens(k: Tensor, table: Tensor | None, queries: int, window: int, first: int) -> int:
    """The most tokens of a sequence that are read."""
    most = k.shape[2] * (1 if table is None else table.shape[1])
    return min(most, first + window + queries) if window else most


def split_count(programs: int, tiles: int, arch: str) -> int:
    """Enough splits to give every multiprocessor two programs, none with less than two tiles."""
    wanted = triton.cdiv(2 * PROCESSORS.get(arch, 108), max(programs, 1))
    return max(1, min(wanted, tiles // 2, _MOST_SPLITS))


def width(cache: Tensor, bits: int) -> int:
    """Channels of a head."""
    return cache.shape[-1] * (8 // bits if cache.dtype == torch.uint8 else 1)


def element(q: Tensor, *caches: Tensor) -> int:
    """Bytes of an element in the tiles: codes become q's dtype there."""
    return max(q.element_size(), *(c.element_size() for c in caches))


def shared_scale(cache: Tensor, scale: Tensor | None, head: int, paged: bool) -> tuple[int, int]:
    """Tokens and channels that share a scale."""
    if scale is None:
        return 1, head
    if scale.shape[2] == 1 and not paged:
        return _ALL_TOKENS, head // scale.shape[3]
    # An empty cache has no groups.
    return max(1, cache.shape[2] // max(scale.shape[2], 1)), head // scale.shape[3]


def alignment(tensor: Tensor) -> int:
    """Bytes, 16 at most, that divide the address of every row; storage starts at more."""
    size = tensor.element_size()
    steps = (s for s, n in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if n > 1)
    return math.gcd(16, tensor.storage_offset() * size, *(s * size for s in steps))


def side_by_side(*tensors: Tensor | None) -> bool:
    return all(t is None or t.shape[-1] <= 1 or t.stride(-1) == 1 for t in tensors)


def side_refused(
    arch: str,
    name: str,
    cache: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bits: int,
    head: int,
    paged: bool,
) -> str | None:
    if cache.dtype not in (*FLOATS, *_FP8, torch.int8, torch.uint8):
        return f"its {name} are {cache.dtype}"
    if cache.dtype == torch.float8_e4m3fn and arch.startswith(_NO_E4M3):
        return f"{arch} does not read {cache.dtype}"
    if cache.dtype == torch.uint8 and arch.startswith("gfx11"):
        return f"the packed codes of its {name} do not fit the registers of {arch}"
    if cache.dtype == torch.uint8 and bits not in (2, 4, 8):
        return f"its {name} have codes of {bits} bits"
    if width(cache, bits) != head or not 0 < head <= 256:
        return f"its {name} have {width(cache, bits)} channels of at most {min(head, 256)}"
    if scale is None:
        whole = cache.dtype in FLOATS or cache.dtype in _FP8
        return None if whole and zero is None else f"its {name} are codes without a scale"
    if zero is not None and (zero.shape, zero.stride()) != (scale.shape, scale.stride()):
        return f"the zeros of its {name} do not lie as their scales do"
    divided = ((scale.shape[2], cache.shape[2]), (scale.shape[3], head))
    if any(whole % n if n else whole for n, whole in divided):
        return f"the scales of its {name} do not divide them evenly"
    shared = shared_scale(cache, scale, head, paged)
    if any(n & (n - 1) for n in shared if n != head):
        return f"{shared} tokens and channels of its {name} share a scale: no powers of two"
    if scale.shape[0] not in (1, cache.shape[0]) or scale.shape[1] not in (1, cache.shape[1]):
        return f"the scales of its {name} are of another batch"
    return None
