"""Linear layers on ternary weights: packing, the operation, its launches and its refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planish.kernels.linear_ternary import SPEC, pack, plan, unpack, why_not


def made(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def signs(*shape: int) -> torch.Tensor:
    return made(*shape, seed=1).sign() * (made(*shape, seed=2).abs() > 0.6)


def arguments(rows: int = 3, int8: bool = False) -> dict[str, Any]:
    packed = pack(signs(6, 300), made(6).abs())
    x = made(rows, 300, seed=3)
    if not int8:
        return {"x": x, "words": packed.words, "scale": packed.scale}
    tokens = x.abs().amax(1) / 127
    x = (x / tokens[:, None]).round().to(torch.int8)
    return {"x": x, "words": packed.words, "scale": packed.scale, "x_scale": tokens}


@pytest.mark.parametrize("length", [1, 31, 256, 300])
def test_packing_loses_nothing(length: int) -> None:
    weight = signs(5, length)
    packed = pack(weight, torch.tensor(0.5))
    assert torch.equal(unpack(packed.words, length).float(), weight)
    assert torch.equal(packed.scale, torch.full((1, 5), 0.5))
    assert packed.words.numel() * 8 == 5 * packed.words.shape[0] * 256


def test_float_activations() -> None:
    args = arguments()
    x = args["x"].double()
    expected = x @ (signs(6, 300).double() * made(6).abs().double()[:, None]).T
    found = SPEC.twin(**{**args, "x": x})
    assert (found - expected).abs().max() <= 300 * 2**-52 * 8 * expected.abs().max()


def test_int8_activations_are_summed_exactly_and_scaled_by_token_and_row() -> None:
    args = arguments(int8=True)
    sums = args["x"].long() @ signs(6, 300).long().T
    expected = sums.double() * args["x_scale"].double()[:, None] * made(6).abs().double()
    found = SPEC.twin(**args).double()
    assert (found - expected).abs().max() <= 3 * 2**-24 * expected.abs().max()
    dense = SPEC.twin(**arguments())
    assert 0 < (found - dense).abs().max() < 0.1 * dense.abs().max()


def test_the_result_has_the_dtype_of_the_scale() -> None:
    args = arguments(int8=True)
    args["scale"] = args["scale"].half()
    assert SPEC.twin(**args).dtype == torch.float16
    assert plan(**args).outputs[0].dtype == torch.float16


@pytest.mark.parametrize("int8", [False, True])
def test_the_operator_is_registered_and_has_a_shape_rule(int8: bool) -> None:
    args = arguments(int8=int8)
    operator = torch.ops.planish.linear_ternary
    assert torch.equal(operator(**args), SPEC.twin(**args))
    torch.library.opcheck(operator.default, tuple(args.values()))


@pytest.mark.parametrize(("rows", "count"), [(1, 2), (16, 2), (17, 1)])
def test_int8_rows_that_are_few_are_split(rows: int, count: int) -> None:
    launches = plan(**arguments(rows, int8=True)).launches
    assert len(launches) == count
    assert launches[0].name.startswith("linear_ternary")


@pytest.mark.parametrize(
    ("int8", "changed", "reason"),
    [
        (False, {}, None),
        (True, {}, None),
        (True, {"x_scale": None}, "its activations are torch.int8 without scales"),
        (False, {"x_scale": torch.ones(3)}, "its activations are torch.float32 with scales"),
        (True, {"x_scale": torch.ones(3, 1)}, "the scales of its tokens have the shape [3, 1]"),
        (False, {"scale": torch.ones(6)}, "its scales are torch.float32 [6]"),
        (False, {"x": made(3, 600)}, "its words are torch.int16 [2, 1, 6, 32] for 600 columns"),
        (False, {"precision": "fast"}, "there is no precision fast"),
        (False, {"gate": torch.ones(2, 6)}, "its epilogue reads a tensor of the shape [2, 6]"),
    ],
)
def test_what_it_cannot_take(int8: bool, changed: dict[str, Any], reason: str | None) -> None:
    assert why_not("sm_80", **{**arguments(int8=int8), **changed}) == reason


def test_cost_counts_two_bits_a_weight() -> None:
    cost = SPEC.cost(**arguments(int8=True))
    assert cost.nbytes == 2 * 6 * 256 // 4 + 6 * 4 + 3 * 4 + 3 * 300 + 3 * 6 * 4
