"""Virtual tokens of a PEFT folder: prefixes of keys and values, or prompts of embeddings.

`adapter_config.json` names the kind; `adapter_model.safetensors` holds `prompt_embeddings`
[tokens, width], with every reparametrization (an MLP, an LSTM) already computed when it was saved.
Of a prefix, width is layers x 2 x kv_heads x head: for each layer its keys, then its values.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .adapter_folder import read_adapter_config, read_adapter_tensors
from .errors import PlanishError

PREFIX = "PREFIX_TUNING"
PROMPTS = ("PROMPT_TUNING", "P_TUNING")
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
    told = read_adapter_config(folder)
    kind = str(told.get("peft_type", "none"))
    if kind not in kinds:
        raise NotVirtualTokens(
            f"the adapter in {folder.name} is of another kind",
            expected=" or ".join(kinds),
            found=kind,
            fix="fold_prefix takes prefixes, fold_prompts prompts, merge_adapters weights",
        )
    values = read_adapter_tensors(folder).get(_NAME)
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
