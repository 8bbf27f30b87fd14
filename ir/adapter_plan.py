"""What an adapter's tensors do to which weights, all of it checked before anything changes."""

from __future__ import annotations

import re

from torch import Tensor

from .adapter_change import Replace
from .adapter_modules import PREFIX, ModuleChanges
from .adapter_step import Step
from .adapter_ties import settle_ties
from .program import Program
from .read_adapter import Adapter, AdapterMismatch

_PARTS = re.compile(
    r"^(?P<module>.*?)\.(?P<part>lora_[AB]\.(?:weight|bias)|lora_[ABE]|lora_embedding_[AB]|"
    r"lora_magnitude_vector(?:\.weight)?|hada_\w+|lokr_\w+|ia3_l|vera_lambda_[bd]|"
    r"hira_(?:embedding_)?[AB]|oft_R\.weight|beft_bias|"
    r"(?:token_adapter\.)?trainable_tokens_delta)$"
)
_WRAPPED = re.compile(r"\.(base_layer|ln_tuning_layers|modules_to_save|original_module)(?=\.|$)")
_MOST_TOLD = 10


def plan_adapter(adapter: Adapter, program: Program, *, untie: bool = False) -> list[Step]:
    """Every change that an adapter makes; raises AdapterMismatch, with up to ten reasons.

    untie: a change of a tied weight is of what one name alone reads.
    """
    plan = ModuleChanges(adapter, program)
    modules: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, value in adapter.tensors.items():
        bare = PREFIX.sub("", name)
        if bare in ("vera_A", "vera_B"):
            continue
        match = _PARTS.match(bare)
        if match is None:
            kept = _WRAPPED.sub("", bare)
            plan.add(kept, Replace(value), kept.rpartition(".")[0])
            continue
        depth = match["module"].count(".base_layer")
        module = _WRAPPED.sub("", match["module"])
        if match["module"].endswith(".base_layer." + module.rpartition(".")[2]):
            plan.inner.add(module)
        modules.setdefault(module, {}).setdefault(depth, {})[match["part"]] = value
    for module, levels in modules.items():
        stack = plan.find(f"{module}.weight") is None and adapter.setting("target_parameters")
        if stack:
            plan.experts(module, [levels[depth] for depth in sorted(levels, reverse=True)])
        else:
            for parts in levels.values():
                plan.module(module, parts)
    steps, tied = settle_ties(adapter, program, plan.steps, untie)
    _refuse(adapter, [*plan.wrong, *tied])
    return steps


def _refuse(adapter: Adapter, wrong: list[str]) -> None:
    if not wrong:
        return
    more = f"; and {len(wrong) - _MOST_TOLD} more" if len(wrong) > _MOST_TOLD else ""
    raise AdapterMismatch(
        f"the adapter {adapter.name} does not fit this base",
        expected="weights of the base's names and sizes, every factor of each",
        found="; ".join(wrong[:_MOST_TOLD]) + more,
        fix="offer the base that the adapter was trained on, before its matmuls are fused",
    )


__all__ = ["plan_adapter"]
