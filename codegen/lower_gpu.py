"""Lower attention for a GPU: FlexAttention where a window, a soft cap or sinks ask for it."""

from __future__ import annotations

from typing import Any

import torch

from ..ir.edit import Editor, value_of
from ..ir.pattern import bound_arguments
from ..ir.program import Program
from ..kernels.attention_flex import attention_flex, why_not


def lower_for_gpu(program: Program) -> tuple[Program, list[str]]:
    """A copy whose attentions on a GPU run by FlexAttention, and a sentence for each attention.

    The others keep `planish::attention`, which becomes scaled_dot_product_attention with flags.
    """
    lowered = program.copy()
    sentences: list[str] = []
    target = torch.ops.planish.attention.default
    for node in lowered.graph.find_nodes(op="call_function", target=target):
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
    return lowered, sentences


def on_gpu(program: Program) -> bool:
    """Whether any attention of the program runs on a GPU."""
    target: Any = torch.ops.planish.attention.default
    nodes = Editor(program).graph.find_nodes(op="call_function", target=target)
    return any(value_of(node).device.type != "cpu" for node in nodes)
