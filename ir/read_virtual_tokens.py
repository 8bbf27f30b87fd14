"""Virtual tokens of a PEFT folder: prefixes of keys and values, or prompts of embeddings.

`adapter_config.json` names the kind; `adapter_model.safetensors` holds `prompt_embeddings`
[tokens, width], with every reparametrization (an MLP, an LSTM) already computed when it was saved.
Of a prefix, width is layers x 2 x kv_heads x head: for each layer its keys, then its values.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .errors import PickleRefused, PlanishError, SourceNotFound
from .read_safetensors import read_safetensors

PREFIX = "PREFIX_TUNING"
PROMPTS = ("PROMPT_TUNING", "P_TUNING")
_TENSORS = "adapter_model.safetensors"
_NAME = "prompt_embeddings"


class NotVirtualTokens(PlanishError):
    """An adapter folder that holds no virtual tokens of the wanted kind, or not as it says."""


@dataclass(frozen=True)
class VirtualTokens:
    """kind: the folder's own word for it. values: [tokens, width]."""

    kind: str
    values: Tensor

    @property
    def count(self) -> int:
        return int(self.values.shape[0])


def read_virtual_tokens(folder: str | Path, kinds: tuple[str, ...]) -> VirtualTokens:
    """Raises SourceNotFound, PickleRefused and NotVirtualTokens."""
    folder = Path(folder)
    config = folder / "adapter_config.json"
    if not config.is_file():
        raise SourceNotFound(
            f"there is no adapter in {folder}",
            expected="a folder with adapter_config.json and adapter_model.safetensors",
            fix="give the folder that PEFT's save_pretrained wrote",
        )
    told = json.loads(config.read_text(encoding="utf-8"))
    kind = str(told.get("peft_type", "none"))
    if kind not in kinds:
        raise NotVirtualTokens(
            f"the adapter in {folder.name} is of another kind",
            expected=" or ".join(kinds),
            found=kind,
            fix="fold_prefix takes prefixes, fold_prompts prompts, merge_adapters weights",
        )
    if not (folder / _TENSORS).is_file():
        pickled = sorted(path.name for path in folder.glob("adapter_model.bin"))
        if pickled:
            raise PickleRefused(
                f"the adapter in {folder.name} is a pickle, which could run any code",
                expected=_TENSORS,
                found=pickled[0],
                fix="save it again with safe_serialization=True",
            )
        raise SourceNotFound(f"the adapter in {folder} has no tensors", expected=_TENSORS)
    values = read_safetensors(folder / _TENSORS).get(_NAME)
    if values is None or values.dim() != 2:
        raise NotVirtualTokens(
            f"the adapter in {folder.name} has no virtual tokens",
            expected=f"{_NAME} [tokens, width]",
            found="nothing of that name" if values is None else str(list(values.shape)),
            fix="save it again with PEFT's save_pretrained",
        )
    wanted = told.get("num_virtual_tokens")
    if wanted is not None and wanted != values.shape[0]:
        raise NotVirtualTokens(
            f"the adapter in {folder.name} contradicts its configuration",
            expected=f"{wanted} virtual tokens",
            found=f"{values.shape[0]}",
        )
    return VirtualTokens(kind, values)
