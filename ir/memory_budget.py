"""The budget of memory for a program's weights: `PLANISH_MEMORY`, such as 512M or 4G."""

from __future__ import annotations

import os
import re

from .errors import WrongOption

_DEFAULT = "1G"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def memory_budget() -> int:
    """Bytes that a program's weights may take in memory; raises WrongOption."""
    text = os.environ.get("PLANISH_MEMORY", _DEFAULT)
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise WrongOption(
            f"PLANISH_MEMORY cannot be {text!r}",
            expected="a number of bytes with K, M, G or T",
            found=text,
            fix="for example PLANISH_MEMORY=4G",
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


__all__ = ["memory_budget"]
