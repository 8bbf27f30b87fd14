"""What an interrupted calibration had finished: encoded weights in a folder, a file for each site.

The files lie in a subfolder named by a digest of the program, its weights, the batches and the
options, so that another run finds nothing of this one. Each file is written aside and renamed:
it is whole or not there.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ir.encoded import Encoded
from ..ir.errors import CorruptFile, PlanishError
from ..ir.formats import parse_format
from ..ir.program import Program
from ..ir.read_safetensors import read_safetensors
from ..ir.text import program_text
from ..ir.write_safetensors import planned, write_safetensors

_FORMS = "planish.forms"


class Checkpoint:
    """Finished weights of one run; `folder` None keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: str) -> dict[str, tuple[Encoded, str]]:
        """The weights that were finished under this name, each with its note; {} if none.

        Raises CorruptFile.
        """
        file = self._file(name)
        if file is None or not file.is_file():
            return {}
        try:
            parts = read_safetensors(file)
            forms = json.loads(bytes(parts[_FORMS].tolist()))
            return {
                weight: (_encoded(form, weight, parts), form["note"])
                for weight, form in forms.items()
            }
        except (PlanishError, KeyError, ValueError, TypeError) as error:
            raise CorruptFile(
                "a file of an interrupted calibration is damaged",
                where=str(file),
                found=str(error).splitlines()[0],
                fix="delete it; the calibration then does this part again",
            ) from error

    def write(self, name: str, finished: Mapping[str, tuple[Encoded, str]]) -> None:
        """Keep finished weights, whole or not at all."""
        file = self._file(name)
        if file is None:
            return
        forms = {
            weight: {
                "format": entry.format.name,
                "shape": list(entry.shape),
                "dtype": str(entry.dtype).removeprefix("torch."),
                "axis": entry.axis,
                "parts": list(entry.parts),
                "note": note,
            }
            for weight, (entry, note) in finished.items()
        }
        tensors = {
            f"{weight}:{part}": planned(tensor)
            for weight, (entry, _) in finished.items()
            for part, tensor in entry.parts.items()
        }
        text = json.dumps(forms).encode()
        tensors[_FORMS] = planned(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        aside = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
        write_safetensors(aside, tensors)
        aside.rename(file)

    def _file(self, name: str) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors"


def _encoded(form: Mapping[str, Any], weight: str, parts: Mapping[str, Tensor]) -> Encoded:
    return Encoded(
        parse_format(form["format"]),
        tuple(form["shape"]),
        getattr(torch, form["dtype"]),
        form["axis"],
        {part: parts[f"{weight}:{part}"] for part in form["parts"]},
    )


def open_checkpoint(
    folder: str, program: Program, batches: Sequence[Sequence[Any]], options: str
) -> Checkpoint:
    """The checkpoint of this very run below `folder`; one that keeps nothing if that is ""."""
    if not folder:
        return Checkpoint(None)
    digest = hashlib.blake2b(options.encode(), digest_size=12)
    digest.update(program_text(program).encode())
    for name in program.weights:
        digest.update(name.encode())
        _update(digest, program.weights[name])
    for batch in batches:
        for value in batch:
            _update(digest, value)
    return Checkpoint(Path(folder).expanduser() / digest.hexdigest())


def _update(digest: Any, value: Any) -> None:
    if not isinstance(value, Tensor):
        digest.update(repr(value).encode())
        return
    digest.update(f"{value.dtype}{list(value.shape)}".encode())
    for block in _bytes(value):
        digest.update(block)


def _bytes(value: Tensor) -> Iterable[memoryview]:
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return (block.numpy().data for block in flat.split(1 << 26))


__all__ = ["Checkpoint", "open_checkpoint"]
