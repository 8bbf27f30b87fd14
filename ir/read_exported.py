"""A program saved by torch.export.save (.pt2), read without running what it may smuggle in.

`torch.export.load` unpickles freely in several places: weights marked `use_pickle`, custom and
opaque objects, weights of the older archive format, and example inputs for which the restricted
unpickler fails. None of these is reached here: an archive that needs one is refused before it is
loaded. What is left of pickle is the restricted form (`weights_only`) for the example inputs.
"""

from __future__ import annotations

import importlib
import io
import json
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from .errors import (
    CorruptFile,
    MissingExtra,
    PickleRefused,
    PlanishError,
    SourceNotFound,
    UnsupportedCheckpoint,
)
from .exported_audit import audit_graph
from .read_safetensors import refuse_pickle

_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_EXAMPLES = "data/sample_inputs/model.pt"
_GRAPH = "models/model.json"
_KNOWN_RECORD = re.compile(
    r"archive_format|archive_version|byteorder|\.data/\w+|\.format_version|models/model\.json"
    r"|data/weights/weight_\d+|data/weights/model_weights_config\.json"
    r"|data/constants/tensor_\d+|data/constants/model_constants_config\.json"
    r"|data/sample_inputs/model\.pt|extra/.*"
)
_OUTPUT_CLASS = re.compile(r'\\"type\\": \\"(transformers(?:\.\w+)*\.model\w+)\.\w+\\"')
_PICKLED_RECORD = re.compile(r"data\.pkl|constants\.pkl|code/.*|.*\.pt|.*(custom|opaque)_obj.*")


def read_exported(file: str | Path) -> ExportedProgram:
    """The program of a .pt2 file; its weights are read into memory.

    Its guards, which are Python source, are dropped: a Program checks its inputs itself.
    Raises SourceNotFound, PickleRefused, CorruptFile and UnsupportedCheckpoint.
    """
    file = Path(file)
    refuse_pickle(file)
    if not file.is_file():
        raise SourceNotFound(
            f"no such file: {file}",
            expected="a .pt2 file written by torch.export.save",
            fix="check the path",
        )
    try:
        archive: Any = torch._C.PyTorchFileReader(str(file))
        records: list[str] = archive.get_all_records()
    except RuntimeError as error:
        raise _corrupt(file, "a zip archive written by torch.export.save", error) from error
    _check_records(file, records)
    _check_contents(file, records, archive.get_record)
    _register_outputs(file, archive.get_record(_GRAPH))
    try:
        exported = torch.export.load(file)
    except NotImplementedError as error:
        raise UnsupportedCheckpoint(
            f"{file.name} takes or returns objects of a class that is not loaded",
            where=str(file),
            expected="tensors, lists, tuples, dicts or registered classes",
            found=str(error).strip().splitlines()[0],
            fix="import the module that registers the class with torch.utils._pytree first",
        ) from error
    except Exception as error:  # a damaged graph makes torch fail in any way: all mean the same
        raise _corrupt(file, "a graph that this torch can rebuild", error) from error
    exported._guards_code = []
    return exported


def _register_outputs(file: Path, graph: bytes) -> None:
    """Load the output classes of transformers that a program returns: importing registers them."""
    for module in sorted(set(_OUTPUT_CLASS.findall(graph.decode("utf-8")))):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise MissingExtra(
                f"{file.name} returns a class of {module}, which is not installed",
                where=str(file),
                found=str(error),
                fix="pip install planish[hf]",
            ) from error


def _check_records(file: Path, records: list[str]) -> None:
    with zipfile.ZipFile(file) as archive:
        old = "version" in archive.namelist()
    pickled = [name for name in records if _PICKLED_RECORD.fullmatch(name) and name != _EXAMPLES]
    if old or pickled:
        what = pickled[0] if pickled else "the archive format of torch before 2.8"
        raise _refused(file, f"{what}, which is read by unpickling")
    unknown = [name for name in records if not _KNOWN_RECORD.fullmatch(name)]
    if unknown:
        raise UnsupportedCheckpoint(
            f"{file.name} holds more than one exported graph: {unknown[0]}",
            where=str(file),
            expected="what torch.export.save writes",
            found=", ".join(unknown[:4]),
            fix="save the program with torch.export.save",
        )
    missing = [name for name in (_GRAPH, *_CONFIGS, _EXAMPLES) if name not in records]
    if missing:
        raise _corrupt(file, f"the record {missing[0]}", f"{len(records)} other records")


def _check_contents(file: Path, records: list[str], read: Callable[[str], bytes]) -> None:
    for name in _CONFIGS:
        for tensor, entry in dict(_json(file, name, read)["config"]).items():
            if entry.get("use_pickle"):
                raise _refused(file, f"{tensor}, stored as a pickle")
    for key, text in audit_graph(_json(file, _GRAPH, read)):
        raise UnsupportedCheckpoint(
            f"{file.name} holds something that torch.export does not write, and is not loaded",
            where=f"{file}: {_GRAPH}",
            expected="tensor operations, shape arithmetic and plain names",
            found=f"{key}: {text[:200]}",
            fix="export the model again with torch.export.save",
        )
    try:
        torch.load(io.BytesIO(read(_EXAMPLES)), weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(file, "example inputs with objects that are not tensors") from error
    except (RuntimeError, EOFError) as error:
        raise _corrupt(file, "example inputs", error) from error


def _json(file: Path, name: str, read: Callable[[str], bytes]) -> Any:
    try:
        return json.loads(read(name))
    except (ValueError, RuntimeError) as error:
        raise _corrupt(file, f"JSON in {name}", error) from error


def _refused(file: Path, found: str) -> PlanishError:
    return PickleRefused(
        f"{file.name} holds pickled objects, and planish loads nothing by pickle",
        where=str(file),
        expected="a program saved by torch.export.save with plain tensors only",
        found=found,
        fix="export the model again, with plain tensors as weights and example inputs",
    )


def _corrupt(file: Path, expected: str, found: object) -> CorruptFile:
    lines = str(found).strip().splitlines()
    return CorruptFile(
        f"{file.name} is damaged or no exported program",
        where=str(file),
        expected=expected,
        found=lines[0] if lines else repr(found),
        fix="save the program again with torch.export.save",
    )
