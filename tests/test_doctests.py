"""The examples in docstrings do what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import planish

ROOT = Path(planish.__file__).parent
ROOMS = ("", "ir", "passes", "kernels", "codegen")


def with_examples() -> list[str]:
    """The modules that hold doctests; the others are not imported."""
    found: list[str] = []
    for room in ROOMS:
        for module in pkgutil.iter_modules([str(ROOT / room)]):
            file = ROOT / room / f"{module.name}.py"
            if file.is_file() and ">>> " in file.read_text(encoding="utf-8"):
                found.append(".".join(part for part in ("planish", room, module.name) if part))
    return found


def test_examples() -> None:
    for name in with_examples():
        result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
        assert result.attempted > 0, name
        assert result.failed == 0, name


def test_failing_examples_are_found() -> None:
    """The runner above can fail."""
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "probe", None, None)
    assert doctest.DocTestRunner(verbose=False).run(test, out=lambda text: None).failed == 1
