"""An adapter as PEFT saves it: adapter_config.json and adapter_model.safetensors, checked.

Only what the folder says is read here; what its tensors do to which weight is in `adapter_plan`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import CorruptFile, MissingTensor, PickleRefused, PlanishError, SourceNotFound
from .read_safetensors import PICKLE_SUFFIXES, read_safetensors

KINDS = ("LORA", "LOHA", "LOKR", "IA3", "VERA", "LN_TUNING", "TRAINABLE_TOKENS", "BITFIT")
_TENSORS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
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


def read_adapter(folder: str | Path) -> Adapter:
    """Raises SourceNotFound, CorruptFile, PickleRefused, MissingTensor, UnsupportedAdapter."""
    folder = Path(folder)
    config = _read_config(folder)
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
    tensors = _read_tensors(folder)
    if not tensors:
        raise MissingTensor(f"the adapter {folder.name} holds no tensors", where=str(folder))
    return Adapter(folder.name, kind, config, tensors)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    if not path.is_file():
        raise SourceNotFound(
            f"there is no adapter in {folder}",
            expected=f"a folder with {_CONFIG} and {_TENSORS}",
            fix="give the folder that PEFT's save_pretrained wrote",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptFile(f"{_CONFIG} is not JSON", where=str(path), found=str(error)) from error
    if not isinstance(config, dict):
        raise CorruptFile(f"{_CONFIG} is no JSON object", where=str(path))
    return config  # pyright: ignore[reportUnknownVariableType]


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    if (folder / _TENSORS).is_file():
        return read_safetensors(folder / _TENSORS)
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix.lower() in PICKLE_SUFFIXES)
    if pickles:
        raise PickleRefused(
            f"the adapter {folder.name} is stored as a pickle, and planish loads nothing by pickle",
            where=str(folder / pickles[0]),
            expected=_TENSORS,
            found=f"{pickles[0]}: reading it would run the code that it holds",
            fix="if you trust it, load it with PEFT and save it with save_pretrained",
        )
    raise SourceNotFound(f"the adapter in {folder} has no tensors", expected=_TENSORS)


def _refuse_variants(folder: Path, config: Mapping[str, Any]) -> None:
    found = {flag: why for flag, why in _VARIANTS.items() if config.get(flag)}
    init = config.get("init_lora_weights")
    changed = isinstance(init, str) and init.lower().startswith(_INITS)
    if changed:
        found[f"init_lora_weights={init}"] = "what it took out of the base weights is not stored"
    if found:
        raise UnsupportedAdapter(
            f"the adapter {folder.name} has settings that change what its factors mean",
            where=str(folder),
            expected="LoRA, rsLoRA, DoRA, PiSSA, OLoRA",
            found="; ".join(f"{flag}: {why}" for flag, why in found.items()),
            fix=_CONVERT if changed else "merge it with PEFT first",
        )


__all__ = ["KINDS", "Adapter", "AdapterMismatch", "UnsupportedAdapter", "read_adapter"]
