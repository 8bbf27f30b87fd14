"""planish: graph optimization passes that make transformer models smaller and faster.

Names load on first use, so that `import planish` is fast and loads no backend.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Optimized as Optimized
    from .api import explain as explain
    from .api import optimize as optimize
    from .api import trace as trace
    from .distill_student import every_other_layer as every_other_layer
    from .distillation import distill as distill
    from .generator import Generator as Generator
    from .ir.errors import PlanishError as PlanishError
    from .ir.pattern import op as op
    from .ir.program import Node as Node
    from .ir.program import Program as Program
    from .ir.rewrite import Rule as Rule
    from .ir.rewrite import rewrite as rewrite
    from .passes.contract import Pass as Pass
    from .passes.contract import RulePass as RulePass
    from .passes.contract import contract as contract
    from .passes.fake_quantize import FakeQuantized as FakeQuantized

__version__ = "0.1.0"

_HOMES = {
    "Optimized": "api",
    "explain": "api",
    "optimize": "api",
    "trace": "api",
    "distill": "distillation",
    "every_other_layer": "distill_student",
    "Generator": "generator",
    "PlanishError": "ir.errors",
    "op": "ir.pattern",
    "Node": "ir.program",
    "Program": "ir.program",
    "Rule": "ir.rewrite",
    "rewrite": "ir.rewrite",
    "Pass": "passes.contract",
    "RulePass": "passes.contract",
    "contract": "passes.contract",
    "FakeQuantized": "passes.fake_quantize",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'planish' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
