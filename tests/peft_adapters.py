"""One adapter of each kind that PEFT makes and planish merges, on tiny public architectures.

Random values stand in for trained ones; what is compared is what PEFT's own merge makes of them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import captured
import peft
import torch
import transformers
from planish.ir.capture import capture_module
from planish.ir.program import Program
from torch import Tensor, nn

LORA = peft.LoraConfig
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
# kind: the model's name, here or in zoo.py, and the adapter
CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "LoRA": ("llama", lambda: LORA(r=4, lora_alpha=7, target_modules=LINEAR)),
    "rsLoRA": ("llama", lambda: LORA(r=3, lora_alpha=7, use_rslora=True, target_modules=LINEAR)),
    "DoRA": ("llama", lambda: LORA(r=4, use_dora=True, target_modules=LINEAR)),
    "PiSSA": ("llama", lambda: LORA(r=4, target_modules=LINEAR, init_lora_weights="pissa")),
    "OLoRA": ("llama", lambda: LORA(r=4, target_modules=LINEAR, init_lora_weights="olora")),
    "LoRA, ranks and alphas by module": (
        "llama",
        lambda: LORA(
            r=4,
            target_modules=LINEAR,
            rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 5},
            alpha_pattern={"k_proj": 3},
        ),
    ),
    "LoRA on embeddings": ("llama", lambda: LORA(r=4, target_modules=["embed_tokens", "lm_head"])),
    "LoRA and modules_to_save": (
        "llama",
        lambda: LORA(r=4, target_modules=["q_proj"], modules_to_save=["down_proj"]),
    ),
    "AdaLoRA": (
        "llama",
        lambda: peft.AdaLoraConfig(
            init_r=4, target_r=2, lora_alpha=7, total_step=10, target_modules=LINEAR
        ),
    ),
    "AdaLoRA on Conv1D": (
        "gpt2",
        lambda: peft.AdaLoraConfig(
            init_r=4, total_step=10, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
        ),
    ),
    "LoRA on nn.MultiheadAttention": (
        "siglip",
        lambda: LORA(r=4, lora_alpha=7, target_modules=["head.attention", "fc1"], bias="all"),
    ),
    "LoHa": ("llama", lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=LINEAR)),
    "HiRA": ("llama", lambda: peft.HiraConfig(r=3, target_modules=[*LINEAR, "embed_tokens"])),
    "HiRA on Conv1D": (
        "gpt2",
        lambda: peft.HiraConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    ),
    "OFT": (
        "llama",
        lambda: peft.OFTConfig(
            r=0, oft_block_size=4, target_modules=LINEAR, use_cayley_neumann=False
        ),
    ),
    "OFT by a series": (
        "llama",
        lambda: peft.OFTConfig(r=2, oft_block_size=0, target_modules=["q_proj", "down_proj"]),
    ),
    "OFT, constrained, one block": (
        "bert",
        lambda: peft.OFTConfig(
            r=0,
            oft_block_size=8,
            target_modules=["query", "output.dense"],
            block_share=True,
            coft=True,
            eps=0.3,
            num_cayley_neumann_terms=3,
        ),
    ),
    "BEFT (BitFit)": ("bert", lambda: peft.BeftConfig(target_modules=["query", "output.dense"])),
    "LoKr": ("llama", lambda: peft.LoKrConfig(r=3, alpha=5, target_modules=LINEAR)),
    "(IA)^3": (
        "llama",
        lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    ),
    "VeRA": ("llama", lambda: peft.VeraConfig(r=6, target_modules=LINEAR)),
    "VeRA by its key": (
        "llama",
        lambda: peft.VeraConfig(r=6, target_modules=["q_proj"], save_projection=False),
    ),
    "LN tuning": ("llama", lambda: peft.LNTuningConfig(target_modules=["input_layernorm"])),
    "trainable tokens": (
        "llama",
        lambda: peft.TrainableTokensConfig(token_indices=[5, 1], target_modules=["embed_tokens"]),
    ),
    "LoRA on Conv1D": (
        "gpt2",
        lambda: LORA(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    ),
    "DoRA on Conv1D": (
        "gpt2",
        lambda: LORA(r=4, target_modules=["c_fc"], fan_in_fan_out=True, use_dora=True),
    ),
    "(IA)^3 on Conv1D": (
        "gpt2",
        lambda: peft.IA3Config(
            target_modules=["c_attn", "mlp.c_proj"],
            feedforward_modules=["mlp.c_proj"],
            fan_in_fan_out=True,
        ),
    ),
    "LoRA, bias=all (BitFit)": (
        "bert",
        lambda: LORA(
            r=4,
            target_modules=["query", "intermediate.dense", "position_embeddings"],
            bias="all",
        ),
    ),
    "LoRA, bias=lora_only": (
        "bert",
        lambda: LORA(r=4, target_modules=["query", "output.dense"], bias="lora_only"),
    ),
    "LoRA, lora_bias": ("bert", lambda: LORA(r=4, target_modules=["query", "key"], lora_bias=True)),
    "LoRA on stacks of experts": (
        "mixtral",
        lambda: LORA(
            r=4,
            target_modules=["q_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ),
    ),
}


@dataclass(frozen=True)
class Base:
    """A model, and inputs of another shape than the captured ones."""

    model: nn.Module
    inputs: dict[str, Tensor]


@functools.cache
def base(name: str) -> Base:
    if name != "siglip":
        sample = captured.sample(name, "eager")
        return Base(sample.model, sample.other_inputs())
    config = transformers.SiglipVisionConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=6,
        image_size=24, patch_size=6,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.SiglipVisionModel._from_config(config, attn_implementation="eager")
    return Base(model.eval(), {"pixel_values": torch.randn(3, 3, 24, 24)})


def captured_base(name: str) -> Program:
    """A private copy of the captured program."""
    if name != "siglip":
        return captured.captured(name, "eager")
    return captured.kept(name, _captured_siglip).copy()


def _captured_siglip() -> Program:
    made = base("siglip")
    return capture_module(made.model, (), {"pixel_values": made.inputs["pixel_values"][:2]})


def trained(name: str, config: Any, folder: Path) -> Any:
    """A PEFT model with an adapter of random values, which is saved in `folder`."""
    model = copy.deepcopy(base(name).model)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.1 * noise
    adapted.save_pretrained(folder)
    return adapted


@dataclass(frozen=True)
class Gap:
    """compared: weights; changed: of them; units: the largest difference, in eps * max|W|."""

    compared: int
    changed: int
    units: float
    worst: str


def weights_gap(before: Program, merged: Program, theirs: Mapping[str, Tensor]) -> Gap:
    """How far merged weights are from those of PEFT's merge."""
    found: list[tuple[float, str]] = []
    changed = 0
    for name in [*merged.weights, *merged.weights.aliases]:
        if name in theirs:
            wide = theirs[name].double()
            gap = (merged.weights[name].double() - wide).abs().max()
            unit = torch.finfo(theirs[name].dtype).eps * wide.abs().max()
            found.append((float(gap / unit) if gap else 0.0, name))
            own = name in merged.weights.names_of(name)[:1]
            changed += own and not torch.equal(merged.weights[name], before.weights[name])
    return Gap(len(found), changed, *max(found))
