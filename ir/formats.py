"""Number formats for weights: a catalog of the files format_*.py of this folder.

A format rounds a weight to codes (`encode`), gives the values back (`decode`) and declares how
far the two may lie apart (`worst_error`). `fmt.name` and `parse_format` are inverse. A file is one
family of formats and declares it in one constant, FAMILY.
"""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path

from .encoded import Encoded, Family, Format
from .errors import UnknownFormat
from .format_affine import AffineInt

__all__ = ["AffineInt", "Encoded", "Format", "families", "known_formats", "parse_format"]


@cache
def families() -> dict[str, Family]:
    """Every family of formats by the name of its file."""
    found: dict[str, Family] = {}
    for path in sorted(Path(__file__).parent.glob("format_*.py")):
        module = importlib.import_module(f".{path.stem}", __package__)
        family = getattr(module, "FAMILY", None)
        assert family is None or isinstance(family, Family), f"FAMILY of {path.name} is no Family"
        if family is not None:
            found[path.stem] = family
    return found


def known_formats() -> list[str]:
    """The usual names; most families take any group size and any dtype of scales."""
    return [name for family in families().values() for name in family.known]


def parse_format(name: str) -> Format:
    """The format of a name such as "int4-g64-sym", "nf4-g64-double", "mxfp4".

    Raises UnknownFormat with the nearest known names.
    """
    for family in families().values():
        if match := re.fullmatch(family.pattern, name):
            return family.parse(match)
    raise UnknownFormat.named(name, known_formats())
