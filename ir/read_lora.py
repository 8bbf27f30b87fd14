"""LoRA factors of a PEFT folder by module: A [rank, in], B [out, rank] and the factor of B A.

Only what stays low-rank at run time: a variant that changes the whole weight is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter_folder import read_adapter_config, read_adapter_tensors
from .errors import PlanishError
from .read_adapter import Adapter, variants

_TENSORS = "adapter_model.safetensors"
_BASE = ".base_layer.weight"  # PEFT saves embeddings and heads beside their adapters
_PREFIX = "base_model.model."
_FLAGS = {
    "use_dora": "DoRA scales the whole weight",
    "lora_bias": "its branch has a bias",
    "modules_to_save": "whole modules are replaced",
    "target_parameters": "parameters that are no modules are adapted",
    "trainable_token_indices": "rows of the embedding are replaced",
}


# Initial values that were taken out of the base weights; a merge can do that again, a branch not.
_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq", "mica")


class CannotServe(PlanishError):
    """An adapter that cannot be kept apart from its base and chosen by index."""


@dataclass(frozen=True)
class LoraFactors:
    """a: [rank, in], b: [out, rank]; the weight [out, in] changes by scale * b @ a."""

    a: Tensor
    b: Tensor
    scale: float


def read_lora(folder: str | Path, base: Mapping[str, Tensor]) -> dict[str, LoraFactors]:
    """Module path -> factors. base: the weights of the base, by name.

    Raises SourceNotFound, PickleRefused and CannotServe.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    _refuse_variants(folder.name, config)
    adapter = Adapter(folder.name, "LORA", config, read_adapter_tensors(folder))
    return _factors(adapter, base)


def _refuse_variants(name: str, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise CannotServe(
            f"the adapter {name} is of another kind",
            expected="LORA",
            found=str(config.get("peft_type")),
            fix="merge it: merge_adapters",
        )
    found = variants(config, _INITS)
    found |= {flag: why for flag, why in _FLAGS.items() if config.get(flag)}
    if config.get("bias", "none") != "none":
        found["bias"] = "biases of the base are replaced"
    if found:
        raise CannotServe(
            f"the adapter {name} cannot be kept beside its base",
            expected="plain LoRA or rank-stabilized LoRA",
            found="; ".join(f"{flag}: {why}" for flag, why in found.items()),
            fix="merge it: merge_adapters",
        )


def _factors(adapter: Adapter, base: Mapping[str, Tensor]) -> dict[str, LoraFactors]:
    tensors = adapter.tensors
    found: dict[str, LoraFactors] = {}
    wrong: list[str] = []
    known = {f"{kind}.weight" for kind in ("lora_A", "lora_B")}
    for key in tensors:
        if key.endswith(_BASE):
            own = key.removeprefix(_PREFIX).removesuffix(_BASE) + ".weight"
            if own not in base or not torch.equal(base[own], tensors[key]):
                wrong.append(f"{own} comes with the adapter and is not the base's")
            continue
        module, _, kind = key.removeprefix(_PREFIX).rpartition(".lora_")
        if f"lora_{kind}" not in known:
            wrong.append(f"{key} is no factor of a linear layer")
        elif kind == "A.weight":
            a, b = tensors[key], tensors.get(key.replace("lora_A", "lora_B"))
            if b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
                shape = None if b is None else list(b.shape)
                wrong.append(f"{module}: lora_A is {list(a.shape)}, lora_B {shape}")
            elif a.shape[0] != adapter.rank(module):
                rank = adapter.rank(module)
                wrong.append(f"{module}: rank {rank} in the configuration, {a.shape[0]} in lora_A")
            else:
                found[module] = LoraFactors(a, b, adapter.scale(module))
    if wrong or not found:
        raise CannotServe(
            f"the adapter {adapter.name} does not hold pairs of factors",
            expected="MODULE.lora_A.weight [rank, in] with MODULE.lora_B.weight [out, rank]",
            found="; ".join(wrong[:10]) or "no tensor of that name",
        )
    return found
