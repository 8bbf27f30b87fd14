"""Which parameter of a model each tensor of a GGUF file is, and how its rows lie there.

Names and arrangements are transformers': its loader is asked with row numbers in place of values,
and what it makes of them tells where each row goes. Needs the extra `hf`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import UnsupportedCheckpoint


class GgufNames:
    """The tensors of one architecture, by names; module: the model, on the meta device."""

    def __init__(self, architecture: str, module: nn.Module, file: Path) -> None:
        from transformers import modeling_gguf_pytorch_utils as theirs

        arranged: Any = theirs
        kind = arranged.TENSOR_PROCESSORS.get(architecture, arranged.TensorProcessor)
        config: Any = module.config
        self._processor: Any = kind(config=config.to_dict())
        try:
            found: dict[str, str] = arranged.get_gguf_hf_weights_map(module, self._processor)
        except NotImplementedError as error:
            raise UnsupportedCheckpoint(
                f"{file.name} holds a {architecture!r} model, whose codes planish cannot place",
                where=str(file),
                expected="an architecture of transformers' tables for GGUF",
                found=str(error).strip().splitlines()[0],
                fix="read it without keep_codes, or offer a folder of safetensors",
            ) from error
        self.parameter = found
        self.where = str(file)

    def rows(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """For each row of the model's matrix its row in the file's, [out, in]; None if not so.

        A model that keeps the matrix as [in, out] has the file's rows as columns.
        """
        height, length = shape
        numbers = np.broadcast_to(np.arange(height, dtype=np.int32)[:, None], (height, length))
        made = self._processed(numbers, name)
        if made is None or made.ndim != 2:
            return None
        if made.shape == shape and bool((made == made[:, :1]).all()):
            return torch.from_numpy(np.array(made[:, 0])).long()
        if made.shape == (length, height) and bool((made == made[:1]).all()):
            return torch.from_numpy(np.array(made[0])).long()
        return None

    def values(self, name: str, stored: np.ndarray[Any, Any]) -> Tensor | None:
        """The model's own values of a dense tensor of the file; None if it wants it elsewhere."""
        made = self._processed(stored, name)
        return None if made is None else torch.from_numpy(np.array(made))

    def _processed(self, values: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any] | None:
        """What transformers makes of a tensor under its own name, or None if it renames it."""
        try:
            result: Any = self._processor.process(
                weights=values,
                name=name,
                tensor_key_mapping=self.parameter,
                parsed_parameters={"tensors": {}},
            )
        except (KeyError, ValueError, IndexError) as error:
            raise UnsupportedCheckpoint(
                f"transformers does not place the tensor {name}",
                where=self.where,
                found=str(error),
                fix="read it without keep_codes, or offer a folder of safetensors",
            ) from error
        return result.weights if result.name == name else None
