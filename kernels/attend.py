"""Attention by the kernel that suits the sizes of a call: in tiles, or split over a long cache.

A few new tokens on a long cache give flash attention too few programs to fill a GPU; the decoding
kernel splits the keys instead (Dao et al. 2023, Flash-Decoding).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import plan as attention_plan
from .decode_attention import plan as decode_plan
from .decode_attention import why_not as decode_why_not
from .launch import Plan

FEW, MANY = 16, 512
"""Up to how many queries, and from how many keys on, the keys are split."""


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    uniform_if_blind: bool = False,
    arch: str = "sm_80",
) -> Plan:
    """`planish::attention` of any sizes; its result is the first of the outputs."""
    queries, keys = q.shape[2], k.shape[2]
    ordered = causal or queries == 1
    if mask is None and ordered and queries <= min(FEW, keys) and keys >= MANY:
        lengths = torch.full((q.shape[0],), keys, dtype=torch.int32, device=q.device)
        call: dict[str, Any] = {"sinks": sinks, "scale": scale, "window": window}
        call |= {"softcap": softcap}
        if decode_why_not(arch, q, k, v, lengths, **call) is None:
            split = decode_plan(q, k, v, lengths, **call, arch=arch)
            return Plan((*split.outputs, lengths), split.launches)
    form: dict[str, Any] = {"causal": causal, "window": window, "softcap": softcap}
    form |= {"uniform_if_blind": uniform_if_blind}
    return attention_plan(q, k, v, mask, sinks, scale=scale, **form, arch=arch)
