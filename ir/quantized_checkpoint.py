"""A Hugging Face folder that is quantized already: a module to capture and its encoded weights.

The codes are carried over bit for bit into planish's number formats; the quantizer's own package
is not needed. Needs the extra `hf`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint_tensors import CheckpointTensors
from .encoded import Encoded
from .encoded_model import EncodedModel
from .errors import TensorMismatch
from .load_state import load_state, main_dtype
from .read_awq import read_awq
from .read_bitnet import read_bitnet
from .read_compressed_tensors import read_compressed_tensors
from .read_float8 import read_float8
from .read_gptq import read_gptq
from .read_hf_folder import (
    Attention,
    configuration,
    import_transformers,
    model_class,
    read_config,
    refuse_quantized,
)
from .read_safetensors import read_safetensors

_Reader = Callable[[CheckpointTensors, Mapping[str, Any], torch.dtype], dict[str, Encoded]]
_READERS: dict[str, _Reader] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed_tensors,
    "bitnet": read_bitnet,
    "fp8": read_float8,
}


def is_quantized_folder(folder: Path) -> bool:
    """Whether config.json tells of a quantization. Raises as `read_config`."""
    return bool(read_config(folder, quantized=True).get("quantization_config"))


def read_quantized_folder(
    folder: str | Path, *, attention: Attention | None = None
) -> EncodedModel:
    """The model of a folder and its weights as they are stored.

    Raises as `read_hf_folder`; UnsupportedCheckpoint for a method that planish does not read.
    """
    folder = Path(folder)
    settings = read_config(folder, quantized=True)
    how: dict[str, Any] = settings.get("quantization_config") or {}
    method = str(how.get("quant_method", "an unnamed method")).lower()
    if method not in _READERS:
        refuse_quantized(folder / "config.json", settings, known=sorted(_READERS))
    stored = read_safetensors(folder)
    tensors = CheckpointTensors(stored, folder)
    dtype = main_dtype(tensors.left)
    entries = _READERS[method](tensors, how, dtype)
    transformers = import_transformers()
    config = configuration(transformers, folder)
    found = model_class(transformers, config, settings, folder)
    model, unused = load_state(
        found, config, tensors.left, entries, dtype, str(folder), attention=attention
    )
    _refuse_unused(tensors.left, entries, unused, folder)
    return EncodedModel(model.module, model.entries, [f"codes of a {method} checkpoint"])


def _refuse_unused(
    dense: Mapping[str, Tensor], entries: Mapping[str, Encoded], unused: list[str], folder: Path
) -> None:
    """A bias that the model has no place for must be zero, as some quantizers write one."""
    layers = {name.rpartition(".")[0] for name in entries}
    for name in unused:
        layer, _, ending = name.rpartition(".")
        if layer in layers and bool((dense[name] != 0).any()):
            raise TensorMismatch(
                f"the checkpoint has a tensor {name} that the model has no place for",
                where=str(folder),
                expected=f"a layer {layer} without {ending}, or with zeros there",
                found=f"{int((dense[name] != 0).sum())} values that are not zero",
                fix="check that config.json belongs to these weights",
            )
