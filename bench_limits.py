"""What the machine can do at most: reading memory, and products of floats and of bytes.

python -m planish.bench_limits THREADS; prints one line of JSON. Of several ways the fastest counts.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .bench_worker import pin

SIZES = tuple(megabytes << 20 for megabytes in (16, 64, 128, 256, 512, 1024))
_ROUNDS, _SECONDS = 7, 0.5


def measure(threads: int) -> dict[str, Any]:
    """Bytes a second by size of what is read over and over; operations a second of products."""
    pin(threads)
    torch.set_num_threads(threads)
    with torch.inference_mode():
        reads = {str(size): size / _best(*_reads(size)) for size in SIZES}
        square = torch.randn(1024, 1024)
        floats = 2 * 1024**3 / _best(lambda: square @ square)
        integers = max(2 * 1024**3 / _best(call) for call in _integers())
    return {"threads": threads, "read": reads, "float32": floats, "int8": integers}


def _best(*calls: Callable[[], object]) -> float:
    """Seconds of the fastest call of some rounds, of more rounds where they are short."""
    taken: list[float] = []
    while len(taken) < _ROUNDS * len(calls) or sum(taken) < _SECONDS:
        for call in calls:
            begun = time.perf_counter()
            call()
            taken.append(time.perf_counter() - begun)
    return min(taken)


def _reads(size: int) -> list[Callable[[], object]]:
    columns = 4096
    # ones: fresh zeros are all one page of the kernel's, which never leaves the cache
    matrix = torch.ones(size // 4 // columns, columns)
    vector = torch.ones(columns)
    return [matrix.sum, lambda: torch.mv(matrix, vector)]


def _integers() -> list[Callable[[], object]]:
    codes = torch.randint(-127, 128, (1024, 1024)).to(torch.int8)
    calls: list[Callable[[], object]] = [lambda: torch._int_mm(codes, codes)]
    with contextlib.suppress(ImportError, RuntimeError, AttributeError):
        own = _own(torch.randn(1024, 1024))
        own()
        calls.append(own)
    return calls


def _own(weight: Tensor) -> Callable[[], object]:
    """planish's product of rounded rows, without rounding them."""
    from .ir.formats import AffineInt
    from .kernels.linear_affine import pack
    from .kernels.linear_w8a8_cpu import SPEC as PRODUCT
    from .kernels.quantize_rows_cpu import SPEC as ROWS

    packed = pack(AffineInt(8).encode(weight))
    product, rows = (getattr(torch.ops.planish, spec.name) for spec in (PRODUCT, ROWS))
    codes, scale = rows(weight)
    given = (codes, scale, None, packed.codes, packed.scale, None, None, None, *packed.sizes)
    return lambda: product(*given)


def share(
    limits: Mapping[str, Any], cost: tuple[float, float], calls: int, compute: str, wall: float
) -> tuple[float, str]:
    """How near to the machine's limit a round came (1: at it), and which limit binds.

    cost: bytes and operations of a round of so many calls that took `wall` seconds.
    """
    nbytes, operations = cost
    memory = nbytes / _bandwidth(limits["read"], nbytes / calls)
    arithmetic = operations / limits[compute]
    return max(memory, arithmetic) / wall, "memory" if memory > arithmetic else "arithmetic"


def _bandwidth(read: Mapping[str, float], size: float) -> float:
    """Of what reads `size` bytes over and over: between two that were measured, by logarithm."""
    known = sorted((math.log(float(key)), value) for key, value in read.items())
    place = math.log(max(size, 1))
    if place <= known[0][0]:
        return known[0][1]
    for (low, first), (high, second) in pairwise(known):
        if place <= high:
            return first + (second - first) * (place - low) / (high - low)
    return known[-1][1]


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
