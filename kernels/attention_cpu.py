"""Attention on the CPU without masks that the query's length makes needless.

A causal mask over as many queries as keys is the flash kernel's own; one query (a decoding step)
sees every key. Which case holds is known at run time, so one compiled program serves them all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ir.ops import _attention as reference
from .spec import Cost, KernelSpec


def attention_cpu_twin(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    uniform: bool,
) -> Tensor:
    """The reference of `planish::attention` without sinks and soft cap."""
    return reference(
        q, k, v, mask, scale=scale, causal=causal, window=window, uniform_if_blind=uniform
    )


def why_not(sinks: object, softcap: float) -> str | None:
    """Why an attention keeps its scores in memory; None if the flash kernel can run it."""
    if sinks is not None:
        return "its sinks join the softmax"
    if softcap:
        return "its scores have a soft cap"
    return None


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    uniform: bool,
) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    causal = causal and queries > 1
    if 0 < window < keys:
        return attention_cpu_twin(q, k, v, mask, scale, causal, window, uniform).contiguous()
    masked = mask is not None and (causal or uniform)
    if masked or (causal and queries != keys):
        return attention_cpu_twin(q, k, v, mask, scale, causal, 0, uniform).contiguous()
    grouped = q.shape[1] != k.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped
    ).contiguous()


def cost(batch: int, heads: int, kv_heads: int, queries: int, keys: int, head: int) -> Cost:
    """Queries, keys, values and results once; two products, half of them if causal."""
    nbytes = 4 * batch * head * (2 * heads * queries + 2 * kv_heads * keys)
    return Cost(nbytes, 4 * batch * heads * queries * keys * head)


_LIBRARY = torch.library.Library("planish", "FRAGMENT")
_LIBRARY.define(
    "attention_cpu(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool causal, "
    "int window, bool uniform) -> Tensor"
)
_LIBRARY.impl("attention_cpu", _launch, "CPU")


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    uniform: bool,
) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


torch.library.register_fake("planish::attention_cpu", _fake, lib=_LIBRARY)

SPEC = KernelSpec(
    name="attention_cpu",
    device="cpu",
    serves="attention without sinks and soft cap; masks only where a length needs them",
    why_not=why_not,
    cost=cost,
    twin=attention_cpu_twin,
)
