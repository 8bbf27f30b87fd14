"""Where an interrupted training goes on: parameters and AdamW's moments in one safetensors file.

The file lies in a subfolder named by a digest of both programs, the batches and the options, so
that another training finds nothing of this one; it is written aside and renamed.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .ir.errors import CorruptFile
from .ir.program import Program
from .ir.read_safetensors import read_safetensors
from .ir.text import program_text
from .ir.write_safetensors import planned, write_safetensors

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class TrainingState:
    """The state of one training; `folder` None keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def load(self, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
        """Put parameters and moments back; returns how many steps were done. CorruptFile."""
        file = self._file()
        if file is None or not file.is_file():
            return 0
        kept = read_safetensors(file)
        try:
            for name, parameter in parameters.items():
                with torch.no_grad():
                    parameter.copy_(kept[f"value:{name}"])
                moments = {m: kept[f"{m}:{name}"] for m in _MOMENTS if f"{m}:{name}" in kept}
                if moments:
                    optimizer.state[parameter] = {m: v.clone() for m, v in moments.items()}
            return int(kept["steps"])
        except (KeyError, RuntimeError) as error:
            raise CorruptFile(
                "the state of an interrupted training is damaged",
                where=str(file),
                found=str(error).splitlines()[0],
                fix="delete it; the training then begins anew",
            ) from error

    def save(
        self, steps: int, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep the state after `steps` steps, whole or not at all."""
        file = self._file()
        if file is None:
            return
        tensors = {"steps": planned(torch.tensor(steps))}
        for name, parameter in parameters.items():
            tensors[f"value:{name}"] = planned(parameter.detach())
            for moment in _MOMENTS:
                if moment in optimizer.state.get(parameter, {}):
                    tensors[f"{moment}:{name}"] = planned(optimizer.state[parameter][moment])
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
        write_safetensors(aside, tensors)
        aside.rename(file)

    def _file(self) -> Path | None:
        return None if self.folder is None else self.folder / "state.safetensors"


def training_state(
    folder: str | Path | None, programs: Sequence[Program], batches: Sequence[Any], options: str
) -> TrainingState:
    """The state of this very training below `folder`; one that keeps nothing if that is None."""
    if folder is None:
        return TrainingState(None)
    digest = hashlib.blake2b(options.encode(), digest_size=12)
    for program in programs:
        digest.update(program_text(program).encode())
        for name in program.weights:
            _update(digest, program.weights[name])
    for batch in batches:
        for value in batch:
            _update(digest, value)
    return TrainingState(Path(folder).expanduser() / digest.hexdigest())


def _update(digest: Any, value: Any) -> None:
    if not isinstance(value, Tensor):
        digest.update(repr(value).encode())
        return
    digest.update(f"{value.dtype}{list(value.shape)}".encode())
    flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
    for block in flat.split(1 << 26):
        digest.update(block.numpy().data)


__all__ = ["TrainingState", "training_state"]
