"""The names of the Triton kernels that planish ships, known without importing them."""

from __future__ import annotations

from pathlib import Path

from planish.kernels import catalog

NAMES = sorted(
    path.stem
    for path in Path(catalog.__file__).parent.glob("*.py")
    if catalog._class_of_spec(path) == "TritonSpec"
)
