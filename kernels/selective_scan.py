"""Selective state-space scan, with its gate, its skip and its states in and out.

Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", eq. 2 with the
discretization of eq. 4 (zero-order hold for A, Euler for B, as its Algorithm 2 is implemented).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .decode_shapes import alignment
from .launch import Config, Launch, Plan
from .operator import define
from .scan_cases import CASES, FORMS
from .scan_tiles import selective_scan_kernel
from .shape_only import shape_only
from .spec import Cost
from .triton_spec import TritonSpec

CONFIGS = (
    Config({"AHEAD": 4}, num_warps=4, num_stages=1),
    Config({"AHEAD": 1}, num_warps=4, num_stages=2),
)
_TILE = 1024
_AHEAD_STATES = 128
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    start: Tensor | None = None,
    softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(delta_t a) h_(t-1) + delta_t b_t u_t; y_t = (c_t h_t + d u_t) * silu(z_t).

    u, delta, z: [batch, tokens, channels]; a: [channels, states]; b, c: [batch, tokens, groups,
    states], a group serving channels / groups neighbours; d, delta_bias: [channels]; start:
    [batch, channels, states], zeros if absent. delta: delta + delta_bias, then its softplus if
    `softplus`. Strides are free but for the states, which lie side by side.

    Returns y [batch, tokens, channels] in u's dtype and the last h [batch, channels, states] in
    float32 (float64 for float64). No tokens leave the start as it is.
    """
    wide = torch.promote_types(u.dtype, torch.float32)
    batch, tokens, channels = u.shape
    if shape_only(u):
        h = torch.empty((batch, *a.shape), dtype=wide, device=u.device)
        return torch.empty(u.shape, dtype=u.dtype, device=u.device), h
    each = channels // b.shape[2]
    step = delta.to(wide) if delta_bias is None else delta.to(wide) + delta_bias.to(wide)
    step = torch.nn.functional.softplus(step) if softplus else step
    h = torch.zeros((batch, *a.shape), dtype=wide, device=u.device)
    h = h if start is None else h + start.to(wide)
    made: list[Tensor] = []
    for t in range(tokens):
        write = (
            b[:, t].repeat_interleave(each, 1).to(wide) * (step[:, t] * u[:, t].to(wide))[..., None]
        )
        h = torch.exp(step[:, t, :, None] * a.to(wide)) * h + write
        made.append((c[:, t].repeat_interleave(each, 1).to(wide) * h).sum(-1))
    y = torch.stack(made, 1) if made else torch.zeros_like(u, dtype=wide)
    y = y if d is None else y + d.to(wide) * u.to(wide)
    y = y if z is None else y * torch.nn.functional.silu(z.to(wide))
    return y.to(u.dtype).contiguous(), h


def plan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    start: Tensor | None = None,
    softplus: bool = False,
    *,
    config: Config | None = None,
    arch: str = "sm_80",
) -> Plan:
    """A program has as many channels as states leave room for; channels are the parallel axis."""
    batch, tokens, channels = u.shape
    states = a.shape[1]
    wide = triton.next_power_of_2(states)
    chosen = config or CONFIGS[tokens < CONFIGS[0].constants["AHEAD"]]
    # Two at least: the compiler takes no hint about a tile of one element.
    block = max(2, min(_TILE // wide, triton.next_power_of_2(channels)))
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    last = torch.empty((batch, *a.shape), dtype=torch.float32, device=u.device)
    args: dict[str, Any] = {
        "U": u,
        "DELTA": delta,
        "A": a,
        "B": b,
        "C": c,
        "D": d,
        "Z": z,
        "BIAS": delta_bias,
        "START": start,
        "Y": y,
        "LAST": last,
        "tokens": tokens,
        "channels": channels,
        "shared": channels // b.shape[2],
        "a_channel": a.stride(0),
        **_strides("u", u, ("batch", "token", "channel")),
        **_strides("delta", delta, ("batch", "token", "channel")),
        **_strides("z", z, ("batch", "token", "channel")),
        **_strides("b", b, ("batch", "token", "group")),
        **_strides("c", c, ("batch", "token", "group")),
        **_strides("start", start, ("batch", "channel")),
    }
    constants = {"A_ALIGN": alignment(a), "LAST_ALIGN": alignment(last)}
    constants |= {"STATES": states, "SOFTPLUS": softplus, "BC": block, "BS": wide}
    constants["UNIFORM"] = b.shape[2] == 1 or (channels // b.shape[2]) % block == 0
    grid = (triton.cdiv(channels, block), batch)
    # As many tokens at a time as there are registers for.
    constants["AHEAD"] = min(chosen.constants["AHEAD"], max(1, _AHEAD_STATES // wide))
    options = (chosen.num_warps, chosen.num_stages)
    return Plan((y, last), (Launch(selective_scan_kernel, grid, args, constants, *options),))


def _strides(prefix: str, tensor: Tensor | None, names: tuple[str, ...]) -> dict[str, int]:
    """Strides by parameter name, 0 where there is no tensor."""
    strides = (0,) * len(names) if tensor is None else tensor.stride()[: len(names)]
    return {f"{prefix}_{name}": stride for name, stride in zip(names, strides, strict=True)}


def why_not(
    arch: str,
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    start: Tensor | None = None,
    softplus: bool = False,
) -> str | None:
    given = [t for t in (u, delta, a, b, c, d, z, delta_bias, start) if t is not None]
    strange = next((t.dtype for t in given if t.dtype not in _FLOATS), None)
    if strange is not None:
        return f"it has values of {strange}"
    if a.shape[1] > 256:
        return f"its {a.shape[1]} states are more than 256"
    if u.shape[2] % b.shape[2] or b.shape[2] != c.shape[2]:
        return f"its {u.shape[2]} channels are no multiple of {b.shape[2]} groups"
    by_state = [t for t in (a, b, c, start) if t is not None]
    if a.shape[1] > 1 and any(t.stride(-1) != 1 for t in by_state):
        return "its states do not lie side by side"
    if any(t is not None and t.shape[0] > 1 and t.stride(0) != 1 for t in (d, delta_bias)):
        return "its skip or its bias is not contiguous"
    if u.shape[0] > 65535:
        return f"it has {u.shape[0]} sequences"
    return None


def cost(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    start: Tensor | None = None,
    softplus: bool = False,
) -> Cost:
    """Everything once, y as large as u; seven operations for each state of each token."""
    batch, tokens, channels = u.shape
    given = [t for t in (u, u, delta, a, b, c, d, z, delta_bias, start) if t is not None]
    moved = sum(t.numel() * t.element_size() for t in given)
    last = 4 * batch * channels * a.shape[1]
    return Cost(moved + last, 7 * batch * tokens * channels * a.shape[1])


SPEC = TritonSpec(
    name="selective_scan",
    schema="planish::selective_scan(Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c, "
    "Tensor? d=None, Tensor? z=None, Tensor? delta_bias=None, Tensor? start=None, "
    "bool softplus=False) -> (Tensor, Tensor)",
    serves="selective state-space layers",
    twin=selective_scan,
    plan=plan,
    configs=CONFIGS,
    why_not=why_not,
    cost=cost,
    cases=CASES,
    forms=FORMS,
)

define(SPEC)
