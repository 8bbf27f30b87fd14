"""Linear layers on 2:4 sparse weights: the operation, its launches and its refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planish.kernels.linear_sparse24 import SPEC, pack, plan, why_not
from planish.kernels.linear_sparse24_cases import pruned


def made(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arguments(rows: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    packed = pack(pruned(made(6, 300)).to(dtype))
    return {
        "x": made(rows, 300, seed=1).to(dtype),
        "values": packed.values,
        "places": packed.places,
    }


def test_the_twin_multiplies_the_pruned_weight() -> None:
    weight, x, bias = pruned(made(6, 300)).double(), made(3, 300, seed=1).double(), made(6).double()
    packed = pack(weight)
    found = SPEC.twin(x, packed.values, packed.places, bias, activation="relu")
    expected = torch.relu(x @ weight.T + bias)
    assert (found - expected).abs().max() <= 300 * 2**-52 * 8 * expected.abs().max()
    moved = SPEC.twin(x, packed.values.flip(1), packed.places, bias, activation="relu")
    assert (moved - expected).abs().max() > 0.1


def test_the_operator_is_registered_and_has_a_shape_rule() -> None:
    args = arguments()
    operator = torch.ops.planish.linear_sparse24
    assert torch.equal(operator(**args), SPEC.twin(**args))
    torch.library.opcheck(operator.default, tuple(args.values()))


@pytest.mark.parametrize(("rows", "count"), [(1, 2), (16, 2), (17, 1)])
def test_few_rows_are_split(rows: int, count: int) -> None:
    assert len(plan(**arguments(rows, torch.float16)).launches) == count


def test_less_is_read_than_of_a_dense_weight() -> None:
    packed = pack(pruned(made(6, 512)).half())
    cost = SPEC.cost(made(1, 512).half(), packed.values, packed.places)
    values, places = 6 * 512 // 2 * 2, 6 * 512 // 4 * 4 // 8  # bytes: two and four bits of four
    assert cost.nbytes == values + places + 2 * (512 + 6)
    assert values + places < 6 * 512 * 2 * 0.6
    assert cost.flops == 2 * 512 * 6


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"residual": torch.zeros(3, 6), "activation": "gelu"}, None),
        ({"x": made(3, 600)}, "its values are torch.float32 [8, 2, 6, 16] for 600 columns"),
        ({"x": made(3, 300).half()}, "its values are torch.float32 [8, 2, 6, 16] for 300 columns"),
        ({"places": torch.zeros(2, 6, 16)}, "its places are torch.float32 [2, 6, 16]"),
        ({"precision": "fast"}, "there is no precision fast"),
        ({"activation": "tanh"}, "there is no kernel for the activation tanh"),
    ],
)
def test_what_it_cannot_take(changed: dict[str, Any], reason: str | None) -> None:
    assert why_not("sm_80", **{**arguments(), **changed}) == reason


def test_places_off_16_bytes_are_refused() -> None:
    args = arguments()
    held = torch.zeros(args["places"].numel() + 1, dtype=torch.int16)
    args["places"] = held[1:].view(args["places"].shape)
    assert why_not("sm_80", **args) == "its values or places do not start on 16 bytes"
