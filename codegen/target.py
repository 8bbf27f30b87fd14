"""What a target is, and the catalog of this folder's targets.

A target is one file that declares one constant, `TARGET = Target(...)`. The catalog reads the
files without importing them, so asking what there is loads no backend.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..ir.errors import MissingExtra, PatternError, UnknownOption, UnknownTarget, WrongOption
from ..ir.program import Program

Export = Callable[..., Mapping[str, Any] | None]
"""export(program, folder, profile, metadata, **options): writes files into an existing folder.

It returns what the manifest should tell besides, section by section, or None.
"""

Extra = Callable[[Path, Mapping[str, Any]], Mapping[str, Any] | None]
"""extra(folder, sections): adds files beside those of the target.

It is told the sections that the target returned, and returns more of them or replaces some.
"""


@dataclass(frozen=True)
class Target:
    """A kind of artifact that a program can be written as.

    profiles: the first is the default. options: further keywords of `export` and their allowed
    values, the first of each the default. open_options: keywords whose values are no list: the
    default as text, and what reads such a text (or raises WrongOption or UnknownOption).
    """

    name: str
    export: Export
    profiles: tuple[str, ...]
    doc: str
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    open_options: Mapping[str, tuple[str, Callable[[str], Any]]] = field(
        default_factory=dict[str, tuple[str, Callable[[str], Any]]]
    )

    def checked_profile(self, profile: str | None) -> str:
        """The profile, or the default one; raises UnknownOption."""
        chosen = profile or self.profiles[0]
        if chosen not in self.profiles:
            raise UnknownOption.named(chosen, self.profiles, f"profile of target {self.name}")
        return chosen

    def checked_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """All options, defaults filled in; raises UnknownOption, WrongOption."""
        chosen: dict[str, Any] = {name: values[0] for name, values in self.options.items()}
        for name, (default, read) in self.open_options.items():
            chosen[name] = read(str(options.get(name, default)))
        for name, value in options.items():
            if name in self.open_options:
                continue
            if name not in self.options:
                known = [*self.options, *self.open_options]
                raise UnknownOption.named(name, known, f"options of target {self.name}")
            if value not in self.options[name]:
                raise WrongOption(
                    f"option {name} of target {self.name} has no value {value!r}",
                    expected=" or ".join(self.options[name]),
                    found=repr(value),
                    fix=f"leave it out for {self.options[name][0]!r}",
                )
            chosen[name] = value
        return chosen


def catalog(folder: Path | None = None) -> dict[str, str]:
    """Target names and the modules that declare them, read from the source files of a folder.

    Raises PatternError for a file whose TARGET does not begin with a literal name.
    """
    folder = folder or Path(__file__).parent
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.py")):
        declared = _declaration(path)
        if declared is None:
            continue
        name = _literal_name(declared)
        if name is None or name in found:
            raise PatternError(
                "a target is declared wrongly",
                where=str(path),
                expected='one TARGET = Target("a name of its own", ...)',
                found=ast.unparse(declared),
                fix="give it a literal name that no other file has",
            )
        found[name] = path.stem
    return found


def _declaration(path: Path) -> ast.expr | None:
    """The value of a module's TARGET, if it assigns one."""
    source = path.read_text(encoding="utf-8")
    if "\nTARGET" not in source:
        return None
    for statement in ast.parse(source).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="TARGET")], value=value):
                return value
            case ast.AnnAssign(target=ast.Name(id="TARGET"), value=ast.expr() as value):
                return value
            case _:
                continue
    return None


def _literal_name(declared: ast.expr) -> str | None:
    if not isinstance(declared, ast.Call):
        return None
    named = [word.value for word in declared.keywords if word.arg == "name"]
    for value in [*declared.args[:1], *named]:
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            return value.value
    return None


def find_target(name: str) -> Target:
    """The target of a name; raises UnknownTarget, which says if a file of that name lacks it."""
    known = catalog()
    if name not in known:
        path = Path(__file__).parent / f"{name}.py"
        lacking = f"{path.name} declares no TARGET" if path.exists() else ""
        raise UnknownTarget.named(name, known, lacking)
    try:
        module = importlib.import_module(f".{known[name]}", __package__)
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("planish"):
            raise
        raise MissingExtra(
            f"target {name} needs the package {missing.name}",
            fix=f"pip install 'planish[{name}]'",
        ) from missing
    return module.TARGET


def export_program(
    program: Program,
    folder: Path,
    target: str = "onnx",
    *,
    profile: str | None = None,
    force: bool = False,
    metadata: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    extra: Extra | None = None,
) -> Path:
    """Write a program as a folder of a target; returns the folder.

    extra: called when the target has written the folder and before it is put in place, to add
    files (a tokenizer's, say); what it returns goes into the manifest. The folder appears whole or
    not at all. Raises UnknownTarget, UnknownOption, WrongOption, OutputExists (unless
    force), OutputNotWritable, UnsupportedByTarget.
    """
    from .bundle import describe, write_bundle

    found = find_target(target)
    chosen = found.checked_profile(profile)
    given = found.checked_options(options or {})
    told = dict(metadata or {})

    def write(place: Path) -> dict[str, Any]:
        sections = found.export(program, place, chosen, told, **given) or {}
        more = (extra(place, sections) if extra else None) or {}
        return {**describe(program, found.name, chosen, given, told), **sections, **more}

    return write_bundle(folder, write, force=force)
