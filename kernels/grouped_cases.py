"""Test problems of the experts' linear layers: small ones with numbers, realistic ones without."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .launch import Config
from .route_experts import capacity, route_experts
from .triton_spec import Arguments, Case, Form


def _problem(
    tokens: int,
    experts: int,
    k: int,
    sizes: tuple[int, int],
    *,
    dtype: torch.dtype = torch.float16,
    block: int = 16,
    second: bool = False,
    activation: str = "none",
    extra: Sequence[str] = (),
    lean: float = 0.0,
    strided: bool = False,
):
    """second: x has a row for each pair; lean: how much the first experts are preferred."""

    def make(generator: torch.Generator) -> Arguments:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        logits = normal(tokens, experts) - lean * torch.arange(experts)
        _, _, places, owners = route_experts(logits, k, True, block)
        pairs = tokens * k
        x = normal(pairs if second else tokens, sizes[0] + 8).to(dtype)
        weight = normal(experts, sizes[1], sizes[0] + 8).mul(sizes[0] ** -0.5).to(dtype)
        x, weight = x[:, : sizes[0]], weight[..., : sizes[0]]
        if not strided:
            x, weight = x.contiguous(), weight.contiguous()
        args = {
            "x": x,
            "weight": weight,
            "places": places,
            "owners": owners,
            "pairs": pairs,
            "activation": activation,
        }
        if "bias" in extra:
            args["bias"] = normal(experts, sizes[1]).to(dtype)
        for name in ("gate", "residual"):
            if name in extra:
                args[name] = normal(pairs, sizes[1]).to(dtype)
        return args

    return make


_BF, _F16, _F32 = torch.bfloat16, torch.float16, torch.float32
_SMALL = Config({"BN": 32, "BK": 32}, num_warps=4, num_stages=2)
_REAL = Config({"BN": 64, "BK": 64}, num_warps=4, num_stages=3)
_WIDE = Config({"BN": 128, "BK": 64}, num_warps=8, num_stages=3)
_ALL = ("bias", "gate", "residual")

CASES = (
    Case("f16", _problem(11, 5, 2, (72, 40)), _SMALL),
    Case(
        "bf16 second layer, strided",
        _problem(7, 3, 2, (40, 72), dtype=_BF, second=True, strided=True),
        _SMALL,
    ),
    Case(
        "f32 bias, silu, gate",
        _problem(9, 4, 3, (36, 20), dtype=_F32, activation="silu", extra=_ALL),
        _SMALL,
    ),
    Case(
        "f16 gelu, everything", _problem(5, 6, 1, (50, 33), activation="gelu", extra=_ALL), _SMALL
    ),
    Case("all to the same expert", _problem(35, 4, 1, (40, 24), lean=50.0), _SMALL),
    Case("no tokens", _problem(0, 4, 2, (40, 24)), _SMALL),
    Case(
        "tiles of 64 f16",
        _problem(50, 3, 2, (136, 72), block=64, activation="silu", extra=("gate",)),
        _REAL,
    ),
    Case("tiles of 64 bf16", _problem(30, 2, 1, (200, 136), dtype=_BF, block=64), _WIDE),
    Case("tiles of 128 f16", _problem(70, 2, 2, (72, 136), block=128), _WIDE),
)


def _form(
    tokens: int,
    experts: int,
    k: int,
    sizes: tuple[int, int],
    block: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    gate: bool = False,
):
    def make() -> Arguments:
        def meta(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=of, device="meta")

        pairs = tokens * k
        room = capacity(pairs, experts, block)
        args = {
            "x": meta(tokens, sizes[0]),
            "weight": meta(experts, sizes[1], sizes[0]),
            "places": meta(room, of=torch.int32),
            "owners": meta(room // block, of=torch.int32),
            "pairs": pairs,
        }
        return args | ({"gate": meta(pairs, sizes[1]), "activation": "silu"} if gate else {})

    return make


FORMS = (
    Form(
        "bf16 4096 x 8, 2 of 8 experts, gate",
        _form(4096, 8, 2, (4096, 14336), 128, gate=True),
        "mma",
        ("sm_", "gfx9"),
    ),
    Form("f16 512 x 64, 6 of 64 experts", _form(512, 64, 6, (2048, 1408), 64, dtype=_F16), "mma"),
    Form(
        "bf16 8 tokens, 8 of 128 experts, gate", _form(8, 128, 8, (2048, 768), 16, gate=True), "mma"
    ),
    Form("f32 32 tokens, 2 of 8 experts", _form(32, 8, 2, (1024, 512), 16, dtype=_F32)),
)
