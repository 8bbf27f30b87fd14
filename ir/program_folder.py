"""A program as a folder: graph.json, weights.safetensors and examples.safetensors.

Nothing is pickled and nothing in the folder is trusted: operators come from a fixed list, shapes
and dtypes are computed again while loading. Weights are memory-mapped, so a large program loads as
fast as a small one.
"""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from .encoded import Encoded, Stored
from .errors import CorruptFile, OutputExists, PlanishError, SourceNotFound
from .formats import parse_format
from .graph_json import graph_from_json, graph_to_json
from .history import Applied, Declined, History, Measured, PassRecord
from .program import Program
from .read_safetensors import read_safetensors
from .sizes_json import Sizes, free_axes
from .tree_json import tree_from_json, tree_to_json
from .values_json import dtype_of, from_json, to_json
from .weights import Derived, Entry, Weights
from .write_safetensors import Planned, planned, write_safetensors

GRAPH, WEIGHTS, EXAMPLES = "graph.json", "weights.safetensors", "examples.safetensors"
_VERSION = 1


def save_program(program: Program, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write the program to a folder, aside first and renamed when it is complete.

    Encoded weights keep their format and parts; derived ones are computed and stored dense. Raises
    OutputExists, OperatorRefused and UnsupportedShape; then no folder is left.
    """
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise OutputExists(
            f"the folder {folder} exists",
            expected="a new folder",
            fix="choose another name, or pass overwrite=True",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    aside.mkdir()
    try:
        _write(program, aside)
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _write(program: Program, folder: Path) -> None:
    in_spec, in_note = tree_to_json(program.in_spec)
    out_spec, out_note = tree_to_json(program.out_spec)
    entries, tensors = _entries_to_json(program.weights)
    examples = [_example_to_json(value, place) for place, value in enumerate(program.examples)]
    metadata = dict(program.metadata)
    notes = [note for note in (in_note, out_note) if note]
    if notes:
        metadata["notes"] = [*metadata.get("notes", []), *notes]
    form = {
        "planish_program": _VERSION,
        "free_axes": free_axes(program.graph),
        **graph_to_json(program.graph),
        "in_spec": in_spec,
        "out_spec": out_spec,
        "weights": entries,
        "aliases": program.weights.aliases,
        "examples": examples,
        "facts": sorted(program.facts),
        "metadata": to_json(metadata, "metadata"),
        "history": to_json(program.history.to_json(), "history"),
    }
    write_safetensors(folder / WEIGHTS, tensors)
    stored = {f"{i}": planned(v) for i, v in enumerate(program.examples) if isinstance(v, Tensor)}
    write_safetensors(folder / EXAMPLES, stored)
    (folder / GRAPH).write_text(json.dumps(form, separators=(",", ":"), allow_nan=False), "utf-8")


def _example_to_json(value: Any, place: int) -> Any:
    if isinstance(value, Tensor):
        return {"example": str(place)}
    return to_json(value, f"example {place}")


def _entries_to_json(weights: Weights) -> tuple[dict[str, Any], dict[str, Planned]]:
    forms: dict[str, Any] = {}
    tensors: dict[str, Planned] = {}
    for name in weights:
        entry = weights.entry(name)
        if isinstance(entry, Encoded):
            parts = {part: f"{name}:{part}" for part in entry.parts}
            dtype = str(entry.dtype).removeprefix("torch.")
            forms[name] = {
                "format": entry.format.name,
                "shape": list(entry.shape),
                "dtype": dtype,
                "axis": entry.axis,
                "parts": parts,
            }
            tensors |= {parts[part]: planned(tensor) for part, tensor in entry.parts.items()}
        elif isinstance(entry, Derived):
            forms[name] = {"derived": entry.label}
            tensors[name] = Planned(tuple(entry.shape), entry.dtype, entry.decode, entry)
        elif isinstance(entry, Tensor):
            forms[name] = {}
            tensors[name] = planned(entry)
        else:
            forms[name] = {"decoded": type(entry).__name__}
            tensors[name] = Planned(tuple(entry.shape), entry.dtype, entry.decode, entry)
    return forms, tensors


def load_program(folder: str | Path) -> Program:
    """Read a folder that `save_program` wrote; the weights stay in their file until used.

    Raises SourceNotFound, CorruptFile (and TruncatedFile) and OperatorRefused.
    """
    folder = Path(folder)
    where = str(folder / GRAPH)
    form = _read_graph(folder)
    try:
        return _program(form, folder, where)
    except PlanishError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CorruptFile(
            f"{GRAPH} is damaged",
            where=where,
            expected="a program as planish writes it",
            found=f"{type(error).__name__}: {str(error)[:200]}",
            fix="save the program again",
        ) from error


def is_program_folder(folder: str | Path) -> bool:
    return (Path(folder) / GRAPH).is_file()


def _read_graph(folder: Path) -> dict[str, Any]:
    file = folder / GRAPH
    if not file.is_file():
        raise SourceNotFound(
            f"{folder} holds no saved program",
            expected=f"a folder with {GRAPH}, {WEIGHTS} and {EXAMPLES}",
            found="no such folder" if not folder.is_dir() else f"no {GRAPH}",
            fix="check the path",
        )
    try:
        form: Any = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptFile(
            f"{GRAPH} is not JSON", where=str(file), found=str(error), fix="save it again"
        ) from error
    version = (
        cast("dict[str, Any]", form).get("planish_program") if isinstance(form, dict) else None
    )
    if version != _VERSION:
        raise CorruptFile(
            f"{GRAPH} is not a program of this version of planish",
            where=str(file),
            expected=f'a JSON object with "planish_program": {_VERSION}',
            found=repr(version),
            fix="save the program with this version, or update planish",
        )
    return cast("dict[str, Any]", form)


def _program(form: dict[str, Any], folder: Path, where: str) -> Program:
    weights = _weights(form, read_safetensors(folder / WEIGHTS))
    sizes = Sizes(form["free_axes"], where)
    graph = graph_from_json(form, sizes, weights, where)
    sizes.check_free()
    in_spec, lost_in = tree_from_json(form["in_spec"], where)
    out_spec, lost_out = tree_from_json(form["out_spec"], where)
    metadata = from_json(form["metadata"], {}, where)
    for lost in (*lost_in, *lost_out):
        note = f"a {lost} is given as a plain container: its class is not loaded"
        metadata["notes"] = [*metadata.get("notes", []), note]
    program = Program(
        graph,
        weights,
        in_spec,
        out_spec,
        frozenset(str(fact) for fact in form["facts"]),
        _history(from_json(form["history"], {}, where)),
        metadata,
    )
    _check_counts(program)
    program.examples = _examples(form["examples"], folder, where)
    return program


def _check_counts(program: Program) -> None:
    sides = (
        (program.in_spec.num_leaves, len(program.inputs)),
        (program.out_spec.num_leaves, len(program.results)),
    )
    for leaves, values in sides:
        if leaves != values:
            raise ValueError(f"{values} values for a structure of {leaves}")


def _weights(form: dict[str, Any], tensors: dict[str, Tensor]) -> Weights:
    entries: dict[str, Entry] = {}
    for name, entry in form["weights"].items():
        entries[name] = _encoded(entry, tensors) if "format" in entry else tensors[name]
    return Weights(entries, {str(alias): str(kept) for alias, kept in form["aliases"].items()})


def _encoded(entry: dict[str, Any], tensors: dict[str, Tensor]) -> Encoded:
    parts = {part: tensors[key] for part, key in entry["parts"].items()}
    shape = tuple(int(size) for size in entry["shape"])
    fmt, dtype, axis = parse_format(entry["format"]), dtype_of(entry["dtype"]), int(entry["axis"])
    encoded = Encoded(fmt, shape, dtype, axis, parts)
    declared = fmt.stored(shape, axis, dtype)
    if declared is None:
        declared = _declared_by_probe(encoded)
    if parts.keys() != declared.keys():
        raise ValueError(f"parts {sorted(parts)} for the format {fmt.name}")
    for name, (kind, sizes) in declared.items():
        _check_part(encoded, name, kind, sizes)
    return encoded


def _declared_by_probe(encoded: Encoded) -> dict[str, Stored]:
    """Names, dtypes and leading axes of the parts, for a format that declares no more."""
    ones = torch.ones([1] * len(encoded.shape), dtype=encoded.dtype)
    probe, rows = encoded.format.encode(ones, encoded.axis), encoded.rows_shape[:-1]
    shared = encoded.format.shared_parts
    return {
        name: (part.dtype, (-1,) * part.dim() if name in shared else (*rows, -1))
        for name, part in probe.parts.items()
    }


def _check_part(encoded: Encoded, name: str, kind: torch.dtype, sizes: tuple[int, ...]) -> None:
    """Parts that do not span the shape would be read past their end. Floats may be of any width."""
    part = encoded.parts[name]
    fits = len(sizes) == part.dim() and all(
        wanted in (-1, size) for wanted, size in zip(sizes, part.shape, strict=True)
    )
    same = part.dtype == kind or (part.is_floating_point() and kind.is_floating_point)
    if not fits or not same:
        found = f"{part.dtype} {list(part.shape)}"
        raise ValueError(f"{name} is {found} for a weight {list(encoded.shape)}")


def _examples(forms: list[Any], folder: Path, where: str) -> tuple[Any, ...]:
    tensors = read_safetensors(folder / EXAMPLES)
    return tuple(
        tensors[form["example"]]
        if isinstance(form, dict) and "example" in form
        else from_json(form, {}, where)
        for form in forms
    )


def _history(records: list[dict[str, Any]]) -> History:
    return History([_record(dict(record)) for record in records])


def _record(form: dict[str, Any]) -> PassRecord:
    parts: dict[str, type[Any]] = {
        "applied": Applied,
        "declined": Declined,
        "measured": Measured,
        "rolled_back": Applied,
    }
    for name, kind in parts.items():
        form[name] = [kind(**entry) for entry in form[name]]
    form["nodes"], form["nbytes"] = tuple(form["nodes"]), tuple(form["nbytes"])
    return PassRecord(**form)


__all__ = ["is_program_folder", "load_program", "save_program"]
