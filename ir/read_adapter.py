"""An adapter as PEFT saves it, checked: its kind, its settings, its tensors.

Only what the folder says is read here; what its tensors do to which weight is in `adapter_plan`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .adapter_folder import read_adapter_config, read_adapter_tensors
from .errors import MissingTensor, PlanishError

KINDS = (
    "LORA",
    "ADALORA",
    "LOHA",
    "LOKR",
    "IA3",
    "VERA",
    "HIRA",
    "OFT",
    "BEFT",
    "LN_TUNING",
    "TRAINABLE_TOKENS",
    "BITFIT",
)
# Settings under which the tensors of a LORA folder mean something else than W + s B A.
_VARIANTS = {
    "arrow_config": "tokens choose among adapters (Arrow)",
    "alora_invocation_tokens": "it begins in the middle of the text (aLoRA)",
    "use_qalora": "its factors act on pooled inputs (QALoRA)",
    "use_bdlora": "its factors are block-diagonal (BD-LoRA)",
    "kasa_config": "its factors are scaled by singular values (KaSA)",
    "monteclora_config": "its factors are sampled (MonteCLoRA)",
    "velora_config": "another backward pass (VeLoRA), not known to save plain factors",
    "layer_replication": "layers of the base are repeated",
    "megatron_config": "it is split over devices",
}
_CONVERT = (
    "save it with save_pretrained(path, path_initial_model_for_weight_conversion=...), "
    "which subtracts the initial factors and leaves plain LoRA"
)
# Initial values that also changed the base weights, in a way that the folder does not tell.
_INITS = ("corda", "lora_ga", "loftq", "mica", "pissa_niter")


class UnsupportedAdapter(PlanishError):
    """An adapter of a kind, or with a setting, that planish does not merge."""


class AdapterMismatch(PlanishError):
    """An adapter that was made for another base, or lacks tensors."""


@dataclass(frozen=True)
class Adapter:
    """name: of the folder; kind: one of KINDS; tensors: by their name in the file."""

    name: str
    kind: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def setting(self, key: str, default: Any = None) -> Any:
        value = self.config.get(key)
        return default if value is None else value

    def by_module(self, patterns: str, default: str, module: str) -> Any:
        """The value that a table of patterns has for a module, or the setting `default`.

        A pattern is a regular expression for the end of the module's path, at a full stop.
        """
        for pattern, value in self.setting(patterns, {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return self.setting(default)

    def rank(self, module: str) -> int:
        if self.kind == "ADALORA":  # directions that training kept, by the module's name
            patterns = self.setting("rank_pattern", {})
            kept = [v for name, v in patterns.items() if name.startswith(f"{module}.")]
            return sum(map(bool, kept[0])) if kept else int(self.setting("init_r"))
        return int(self.by_module("rank_pattern", "r", module))

    def scale(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023, eq. 3), by the module's numbers."""
        rank = self.rank(module)
        name = "lora_alpha" if self.kind == "LORA" else "alpha"
        alpha = float(self.by_module("alpha_pattern", name, module))
        return alpha / (math.sqrt(rank) if self.setting("use_rslora") else rank)


def read_adapter(folder: str | Path) -> Adapter:
    """Raises SourceNotFound, CorruptFile, PickleRefused, MissingTensor, UnsupportedAdapter."""
    folder = Path(folder)
    config = read_adapter_config(folder)
    kind = str(config.get("peft_type"))
    if kind not in KINDS:
        raise UnsupportedAdapter(
            f"the adapter {folder.name} is of the kind {kind}, which is not merged",
            where=str(folder),
            expected=", ".join(KINDS),
            found=kind,
            fix="merge it with its own library first, or capture the model with the adapter in it",
        )
    if kind == "LORA":
        _refuse_variants(folder, config)
    tensors = read_adapter_tensors(folder)
    if not tensors:
        raise MissingTensor(f"the adapter {folder.name} holds no tensors", where=str(folder))
    return Adapter(folder.name, kind, config, tensors)


def variants(config: Mapping[str, Any], inits: tuple[str, ...] = _INITS) -> dict[str, str]:
    """Settings under which a LORA folder's factors are no plain branch: what, and why.

    inits: initial values (the beginnings of their names) that changed the base weights.
    """
    found = {flag: why for flag, why in _VARIANTS.items() if config.get(flag)}
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(inits):
        found[f"init_lora_weights={init}"] = "what it took out of the base weights is not stored"
    return found


def _refuse_variants(folder: Path, config: Mapping[str, Any]) -> None:
    found = variants(config)
    changed = any(flag.startswith("init_lora_weights") for flag in found)
    if found:
        raise UnsupportedAdapter(
            f"the adapter {folder.name} has settings that change what its factors mean",
            where=str(folder),
            expected="LoRA, rsLoRA, DoRA, PiSSA, OLoRA",
            found="; ".join(f"{flag}: {why}" for flag, why in found.items()),
            fix=_CONVERT if changed else "merge it with PEFT first",
        )


__all__ = ["KINDS", "Adapter", "AdapterMismatch", "UnsupportedAdapter", "read_adapter", "variants"]
