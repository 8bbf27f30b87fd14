"""Cut from our modules what a package needs to stand alone: definitions and what they refer to.

A package imports only torch, triton and Python's own library. From the names it calls, all
definitions that these use are followed through our modules and copied as they are written,
comments included; everything else (twins, cases, registration) stays behind.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

_PACKAGE = __package__.rpartition(".")[0] if __package__ else "planish"


@dataclass
class _Module:
    """A source file: where every top-level name is defined or imported from."""

    name: str
    text: str
    tree: ast.Module
    defined: dict[str, ast.stmt] = field(default_factory=dict[str, ast.stmt])
    imported: dict[str, tuple[ast.stmt, str, str]] = field(
        default_factory=dict[str, tuple[ast.stmt, str, str]]
    )
    needed: set[str] = field(default_factory=set[str])

    @property
    def file(self) -> str:
        """Its name in a package: kernels/gated.py is gated, ir/ops.py is ir_ops."""
        parts = self.name.removeprefix(f"{_PACKAGE}.").split(".")
        return parts[-1] if parts[0] == "kernels" else "_".join(parts)


def extract(roots: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Standalone sources by file name (without .py) for (module, name) pairs of our modules.

    Modules come in an order in which each imports only earlier ones. Raises KeyError for a name
    that its module does not have.
    """
    modules: dict[str, _Module] = {}
    for module, name in roots:
        _need(modules, module, name)
    return {module.file: _shaken(module, modules) for module in _ordered(modules)}


def _need(modules: dict[str, _Module], module_name: str, name: str) -> None:
    module = modules.get(module_name) or modules.setdefault(module_name, _read(module_name))
    if name in module.needed:
        return
    module.needed.add(name)
    if name in module.imported:
        _, source, original = module.imported[name]
        if source.startswith(f"{_PACKAGE}."):
            _need(modules, source, original)
        return
    for read in _names(module.defined[name]):
        if read in module.defined or read in module.imported:
            _need(modules, module_name, read)


def _read(name: str) -> _Module:
    path = importlib.import_module(name).__file__
    assert path is not None
    text = Path(path).read_text(encoding="utf-8")
    module = _Module(name, text, ast.parse(text))
    package = name.rpartition(".")[0]
    for statement in module.tree.body:
        match statement:
            case ast.Import(names=aliases):
                for alias in aliases:
                    bound = alias.asname or alias.name.split(".")[0]
                    module.imported[bound] = (statement, alias.name, "")
            case ast.ImportFrom(module=source, names=aliases, level=level):
                base = package.rsplit(".", level - 1)[0] if level else ""
                full = ".".join(part for part in (base, source or "") if part)
                for alias in aliases:
                    module.imported[alias.asname or alias.name] = (statement, full, alias.name)
            case ast.FunctionDef(name=bound) | ast.ClassDef(name=bound):
                module.defined[bound] = statement
            case ast.Assign(targets=targets):
                for target in targets:
                    for node in ast.walk(target):
                        if isinstance(node, ast.Name):
                            module.defined[node.id] = statement
            case ast.AnnAssign(target=ast.Name(id=bound)):
                module.defined[bound] = statement
            case _:
                continue
    return module


def _names(statement: ast.stmt) -> set[str]:
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}


def _ordered(modules: dict[str, _Module]) -> list[_Module]:
    order: list[_Module] = []

    def place(module: _Module) -> None:
        if module in order:
            return
        for name in module.needed & module.imported.keys():
            source = module.imported[name][1]
            if source in modules:
                place(modules[source])
        order.append(module)

    for module in modules.values():
        place(module)
    return order


def _shaken(module: _Module, modules: dict[str, _Module]) -> str:
    """The module's text with only the needed statements, and imports within the package."""
    lines = module.text.splitlines()
    docstring = ast.get_docstring(module.tree, clean=False)
    parts = [f'"""{docstring}"""\n' if docstring else "", "from __future__ import annotations\n"]
    parts += _imports(module, modules)
    kept = [module.defined[name] for name in module.needed if name in module.defined]
    for statement in sorted(dict.fromkeys(kept), key=lambda s: s.lineno):
        parts.append("\n\n" + _segment(statement, lines))
    return "\n".join(part for part in parts if part) + "\n"


def _imports(module: _Module, modules: dict[str, _Module]) -> list[str]:
    whole: list[str] = []
    parts: dict[str, list[str]] = {}
    for name in sorted(module.needed & module.imported.keys()):
        _, source, original = module.imported[name]
        if not original:
            alias = f" as {name}" if name != source.split(".")[0] or "." in source else ""
            whole.append(f"import {source}{alias}")
            continue
        home = f".{modules[source].file}" if source in modules else source
        parts.setdefault(home, []).append(original + (f" as {name}" if name != original else ""))
    parts.pop("__future__", None)
    outer = [f"from {home} import {', '.join(names)}" for home, names in sorted(parts.items())]
    ours = [line for line in outer if line.startswith("from .")]
    return [*whole, *(line for line in outer if line not in ours), *ours]


def _segment(statement: ast.stmt, lines: list[str]) -> str:
    """The statement's own lines, with decorators and the comments and string just around it."""
    first = statement.lineno
    for decorator in getattr(statement, "decorator_list", []):
        first = min(first, decorator.lineno)
    while first > 1 and lines[first - 2].startswith("#") and "pyright" not in lines[first - 2]:
        first -= 1
    return "\n".join(lines[first - 1 : statement.end_lineno])
