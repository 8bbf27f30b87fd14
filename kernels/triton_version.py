"""Refuse a Triton that the kernels were not verified with."""

from __future__ import annotations

import importlib.metadata

from ..ir.errors import MissingExtra, PlanishError
from .triton_spec import TRITON


class WrongTriton(PlanishError):
    """Another series of Triton than the verified one."""


def check_triton() -> str:
    """The installed version; raises MissingExtra, WrongTriton."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        raise MissingExtra(
            "GPU kernels need the package triton", fix="pip install 'planish[triton]'"
        ) from None
    if version.split(".")[:2] != TRITON.split("."):
        raise WrongTriton(
            "the kernels were not verified with this Triton",
            expected=f"triton {TRITON}.*",
            found=f"triton {version}",
            fix=f"pip install 'triton=={TRITON}.*'",
        )
    return version
