"""A transformers model from tensors at hand: dense ones, and encoded ones that keep their codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .encoded import Encoded
from .encoded_model import EncodedModel, placed, stand_ins
from .read_hf_folder import Attention, import_transformers, prepare, quiet, refuse_incomplete


def load_state(
    model_class: Any,
    config: Any,
    dense: Mapping[str, Tensor],
    entries: Mapping[str, Encoded],
    dtype: torch.dtype,
    where: str,
    *,
    attention: Attention | None = None,
) -> tuple[EncodedModel, list[str]]:
    """The model in inference form, and the names of the tensors that it had no place for.

    dense, entries: by the names of the checkpoint, entries as [out, in]. dtype: of the weights.
    Raises MissingTensor, TensorMismatch, UnsupportedCheckpoint.
    """
    transformers = import_transformers()
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    entries = _as_modules_have_them(model_class, config, entries)
    options: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    state = {**dense, **stand_ins(entries, dtype, where)}
    with quiet(transformers):
        model, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    refuse_incomplete(where, model, report)
    found = placed(model, entries, dtype, where)
    return EncodedModel(prepare(model), found), sorted(report["unexpected_keys"])


def main_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The floating-point dtype of two bytes or more that most of the values have."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
            sizes[tensor.dtype] += tensor.nbytes
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def _as_modules_have_them(
    model_class: Any, config: Any, entries: Mapping[str, Encoded]
) -> dict[str, Encoded]:
    """A module that keeps its weight [in, out] has the codes as they are, along the other axis."""
    with torch.device("meta"):
        modules = dict(model_class(config).named_modules())
    turned: dict[str, Encoded] = {}
    for name, entry in entries.items():
        module: nn.Module | None = modules.get(name.rpartition(".")[0])
        if type(module).__name__ == "Conv1D":
            shape = (entry.shape[1], entry.shape[0])
            turned[name] = Encoded(entry.format, shape, entry.dtype, -2, entry.parts)
        else:
            turned[name] = entry
    return turned
