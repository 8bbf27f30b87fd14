"""What a search has measured already, in a folder: prices by weight and format.

The file is named by a digest of the program, its batches and the options that the prices depend
on, so that another search finds nothing of this one. It is written aside and renamed.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from pathlib import Path

from torch import Tensor

from .ir.program import Program
from .ir.text import program_text
from .passes.calibrate import Batches
from .search_sensitivity import Costs


class State:
    """The prices of one search; a folder of None keeps nothing."""

    def __init__(
        self, folder: Path | None, program: Program, batches: Batches, options: object
    ) -> None:
        self.file = (
            None if folder is None else folder / f"{_digest(program, batches, options)}.json"
        )

    def read(self) -> Costs:
        """What is known; {} at first, or if the file is damaged."""
        if self.file is None or not self.file.is_file():
            return {}
        try:
            known: Costs = json.loads(self.file.read_text("utf-8"))
        except ValueError:
            return {}
        return known

    def write(self, costs: Costs) -> None:
        """Keep these prices in place of the former ones."""
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        aside = self.file.with_name(f".{self.file.name}.{uuid.uuid4().hex[:8]}")
        aside.write_text(json.dumps(costs), "utf-8")
        aside.rename(self.file)


def _digest(program: Program, batches: Batches, options: object) -> str:
    found = hashlib.sha256(program_text(program).encode())
    found.update(repr(options).encode())
    for name in sorted(program.weights):
        weight = program.weights[name].flatten()
        if weight.is_floating_point():
            picked = weight[:: max(1, weight.numel() // 16)].float()
            found.update(name.encode() + picked.numpy().tobytes())
    for batch in batches:
        for value in batch:
            plain = value.float().numpy().tobytes() if isinstance(value, Tensor) else repr(value)
            found.update(plain if isinstance(plain, bytes) else plain.encode())
    return found.hexdigest()[:16]


__all__ = ["State"]
