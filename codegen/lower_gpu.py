"""Lower a program for a compiler on a GPU: our Triton kernels as operators, FlexAttention, SDPA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ir.edit import Editor, value_of
from ..ir.errors import MissingExtra
from ..ir.pattern import bound_arguments
from ..ir.program import Program
from ..kernels.attention_flex import attention_flex, why_not
from ..kernels.triton_version import WrongTriton, check_triton


def lower_for_gpu(program: Program, arch: str | None = None) -> tuple[Program, list[str]]:
    """A copy whose attentions and packed weights run on our kernels, and what does not, and why.

    arch: of the GPU (default: the current one). Attention that flash attention does not take runs
    by FlexAttention where a window, a soft cap or sinks ask for it, else it keeps
    `planish::attention`, which becomes scaled_dot_product_attention with flags. Without the
    verified Triton none of our kernels is used. Dense products and what lies between kernels are
    left to the compiler.
    """
    lowered = program.copy()
    editor = Editor(lowered)
    sentences: list[str] = []
    try:
        check_triton()
    except (MissingExtra, WrongTriton) as error:
        sentences.append(f"no kernel of planish runs because {error.what}")
    else:
        sentences += _use_kernels(editor, arch)
        editor.sweep()
    sentences += _use_flex(editor)
    return lowered, sentences


def _use_kernels(editor: Editor, arch: str | None) -> list[str]:
    from ..kernels.operator import this_arch
    from .gpu_adapters import lower_adapters
    from .gpu_attention import lower_attentions
    from .gpu_calls import Calls
    from .gpu_products import lower_products, lower_tables

    if not on_gpu(editor.program):
        return []
    calls = Calls(editor, (arch or this_arch(),), operators=True)
    lower_tables(calls)
    sentences = [*lower_attentions(calls), *lower_products(calls, dense=False)]
    return [*sentences, *lower_adapters(calls)]


def _use_flex(editor: Editor) -> list[str]:
    sentences: list[str] = []
    target = torch.ops.planish.attention.default
    for node in editor.graph.find_nodes(op="call_function", target=target):
        given = bound_arguments(node)
        reason = why_not(
            value_of(node).device.type,
            given["mask"],
            given["window"],
            given["softcap"],
            given["sinks"],
            given["uniform_if_blind"],
        )
        if reason is None:
            node.target = attention_flex
            sentences.append(f"%{node.name} runs by FlexAttention")
        else:
            sentences.append(f"%{node.name} is scaled_dot_product_attention because {reason}")
    return sentences


def on_gpu(program: Program) -> bool:
    """Whether any value of the program lies on a GPU."""
    values: list[Any] = [node.meta.get("val") for node in program.graph.nodes]
    return any(isinstance(value, Tensor) and value.device.type == "cuda" for value in values)
