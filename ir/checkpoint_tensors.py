"""The tensors of a quantized checkpoint by layer, taken one by one and checked as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .errors import MissingTensor, TensorMismatch


class CheckpointTensors:
    """The tensors of a folder; what a reader takes is gone, what is left is dense."""

    def __init__(self, tensors: dict[str, Tensor], folder: Path) -> None:
        self.left, self.where = dict(tensors), str(folder)

    def layers(self, ending: str) -> list[str]:
        """Paths of the layers that have a tensor `path.ending`, in the file's order."""
        return [name[: -len(ending) - 1] for name in self.left if name.endswith(f".{ending}")]

    def has(self, layer: str, ending: str) -> bool:
        return f"{layer}.{ending}" in self.left

    def take(
        self, layer: str, ending: str, dtypes: Sequence[torch.dtype] = (), axes: int | None = None
    ) -> Tensor:
        """The tensor `layer.ending`; raises MissingTensor, TensorMismatch (dtype, axes)."""
        name = f"{layer}.{ending}"
        if name not in self.left:
            others = sorted(other for other in self.left if other.startswith(f"{layer}."))
            raise MissingTensor(
                f"the checkpoint lacks {name}",
                where=self.where,
                expected=f"{ending} beside the other tensors of {layer}",
                found=", ".join(others) or "none",
                fix="copy every file of the checkpoint",
            )
        tensor = self.left.pop(name)
        if dtypes and tensor.dtype not in dtypes:
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise self.mismatch(name, expected, str(tensor.dtype).removeprefix("torch."))
        if axes is not None and tensor.dim() != axes:
            raise self.mismatch(name, f"{axes} axes", f"a shape {list(tensor.shape)}")
        return tensor

    def check_shape(self, layer: str, ending: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """The tensor itself, if it has this shape; raises TensorMismatch."""
        if tuple(tensor.shape) != tuple(shape):
            raise self.mismatch(f"{layer}.{ending}", str(list(shape)), str(list(tensor.shape)))
        return tensor

    def mismatch(self, name: str, expected: str, found: str) -> TensorMismatch:
        return TensorMismatch(
            f"the tensor {name} does not fit",
            where=self.where,
            expected=expected,
            found=found,
            fix="check that config.json (its quantization_config) belongs to these weights",
        )
