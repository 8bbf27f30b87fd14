"""Let a peer make weights from our calibration slices, and tell what that cost.

Runs in an environment of the peers' own, without planish.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = Mapping[str, Tensor]


def write_peer_weights(
    make: Callable[[Tensor], Weights],
    row: dict[str, Any],
    *,
    slices: Path,
    calibration: int,
    out: Path,
    look: Callable[[Weights], dict[str, Any]] = lambda weights: {},
) -> None:
    """Call `make` with int64 ids [calibration, length] on one thread; write its weights as float32.

    Prints `row` with processor seconds, wall seconds, peak memory and what `look` sees, as JSON.
    """
    torch.set_num_threads(1)
    ids = load_file(slices)["calibration"][:calibration]
    start, wall = time.process_time(), time.perf_counter()
    weights = make(ids)
    cost = {
        "calibration": calibration,
        "seconds": round(time.process_time() - start, 1),
        "wall": round(time.perf_counter() - wall, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    save_file({name: w.detach().float().contiguous() for name, w in weights.items()}, out)
    print(json.dumps(row | cost | look(weights)))
