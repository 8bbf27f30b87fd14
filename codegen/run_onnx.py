"""Run an exported ONNX folder with onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from ..ir.errors import SourceNotFound, WrongInput
from .onnx import MODEL


class OnnxModel:
    """An exported folder as a callable: `model(input_ids=ids)["logits"]`.

    Inputs are torch tensors or numpy arrays, by position or by name; outputs come back by name,
    as torch tensors if any input was one, else as arrays. threads: 0 takes onnxruntime's default.
    """

    def __init__(self, folder: str | Path, *, threads: int = 0) -> None:
        path = Path(folder)
        path = path / MODEL if path.is_dir() else path
        if not path.exists():
            raise SourceNotFound(
                "there is no exported ONNX model",
                where=str(path),
                fix="export a program with target onnx first",
            )
        self.session = ort.InferenceSession(path, session_options(threads))
        self.input_names = [value.name for value in self.session.get_inputs()]
        self.output_names = [value.name for value in self.session.get_outputs()]

    @property
    def metadata(self) -> dict[str, str]:
        """The model's properties: `planish.recipe`, `planish.history`, ..."""
        return self.session.get_modelmeta().custom_metadata_map

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        given = self._by_name(args, kwargs)
        arrays = {name: _array(value) for name, value in given.items()}
        results = self.session.run(None, arrays)
        if any(isinstance(value, Tensor) for value in given.values()):
            results = [torch.from_numpy(result) for result in results]
        return dict(zip(self.output_names, results, strict=True))

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        given = {**dict(zip(self.input_names, args, strict=False)), **kwargs}
        if set(given) != set(self.input_names) or len(args) + len(kwargs) != len(given):
            raise WrongInput(
                "the inputs do not fit the exported model",
                expected=", ".join(self.input_names),
                found=f"{len(args)} positional and {sorted(kwargs)}",
                fix="pass every input once",
            )
        return given


def session_options(threads: int = 0) -> ort.SessionOptions:
    """Options with a number of threads (0: onnxruntime's default), and only errors told."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return options


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
