"""All rules of axis flow by operation; what is not here stops a factor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .axes import Flow
from .axes_arithmetic import ARITHMETIC, tie_all
from .axes_layout import LAYOUT
from .axes_mixing import MIXING
from .axes_products import PRODUCTS
from .program import Node

__all__ = ["HANDLERS", "tie_all"]

HANDLERS: dict[Any, Callable[[Flow, Node], Any]] = LAYOUT | ARITHMETIC | PRODUCTS | MIXING
