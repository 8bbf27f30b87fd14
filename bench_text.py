"""The tokens that a benchmark runs on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class BenchText:
    """tokens: for prompts and sentences. slices: texts on which quality is measured.

    calibration: texts, all of one length, for what looks at data. folder: where files go. source:
    what all that is, in words.
    """

    tokens: Sequence[int]
    slices: Sequence[Sequence[int]]
    calibration: Sequence[Sequence[int]]
    folder: Path
    source: str

    def calibration_file(self) -> Path:
        """int64 [texts, length] as a .npy file."""
        file = self.folder / "calibration.npy"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, np.asarray(self.calibration, np.int64))
        return file
