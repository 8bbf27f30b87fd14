"""Give a tied weight's name values of its own: its readers read them, the others stay tied.

Which reader goes by which name follows from the module that it was captured in.
"""

from __future__ import annotations

from .edit import Editor
from .program import Node, Program


def readers_by_name(program: Program, name: str) -> dict[str, list[Node]] | str:
    """The readers of a tied weight by each of its names, or why they cannot be told apart."""
    names = program.weights.names_of(name)
    found: dict[str, list[Node]] = {own: [] for own in names}
    by_module = {own.rpartition(".")[0]: own for own in names}
    for node in program.weight_nodes():
        if program.weights.canonical(str(node.target)) != names[0]:
            continue
        for user in node.users:
            module = str(user.meta.get("module", ""))
            if module not in by_module:
                return f"%{user.name} of {module or 'no module'} reads it under no name of its own"
            found[by_module[module]].append(user)
    return found


def untie(program: Program, name: str) -> None:
    """After this no other name reads what `name` reads; `readers_by_name` must tell them apart."""
    weights = program.weights
    kept = weights.canonical(name)
    readers = readers_by_name(program, name)
    assert not isinstance(readers, str)
    others = [other for other in weights.names_of(kept) if other != name]
    moved = [name] if name != kept else others
    entry = weights.entry(kept)
    for alias in moved:
        del weights.aliases[alias]
    weights[moved[0]] = entry
    weights.aliases |= dict.fromkeys(moved[1:], moved[0])
    editor = Editor(program)
    old, new = editor.weight(kept), editor.weight(moved[0])
    for own in moved:
        for reader in readers[own]:
            reader.replace_input_with(old, new)


__all__ = ["readers_by_name", "untie"]
