"""The layer of int8 codes and outlier columns: its twin, what outliers are for, its refusals."""

from __future__ import annotations

from typing import Any

import torch
from planish.kernels.linear_llm_int8 import cost, linear_llm_int8, plan, why_not
from planish.kernels.linear_w8a8_cases import int8_weight
from torch import Tensor

HALF = torch.float16
operator = torch.ops.planish.linear_llm_int8


def problem(columns: list[int]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """x with outliers in columns 3 and 17, the arguments, and the weight that they stand for."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = random(5, 23)
    x[:, [3, 17]] *= 1e3
    weight = random(7, 23).half()
    codes, scale = int8_weight(lambda *_: weight.float() * 23**0.5, 7, 23)
    regular = torch.ones(23, dtype=torch.uint8)
    regular[columns] = 0
    arguments = {
        "weight": codes,
        "weight_scale": scale,
        "outliers": torch.tensor(columns, dtype=torch.int32),
        "outlier_weight": weight[:, columns],
        "regular": regular,
    }
    return x.to(HALF), arguments, weight


def test_two_products_added() -> None:
    x, given, weight = problem([3, 17])
    others = [c for c in range(23) if c not in (3, 17)]
    part = x[:, others].double()
    steps = part.abs().amax(1, keepdim=True) / 127
    codes = (part / steps).round()
    loose = given["weight"][:, others].double() * given["weight_scale"].double()[:, None]
    wanted = (codes * steps) @ loose.t()
    wanted += x[:, [3, 17]].double() @ weight[:, [3, 17]].double().t()
    got = operator(x, **given)
    assert (got.double() - wanted).abs().max() <= 2.0**-11 * wanted.abs().max()


def test_outliers_in_16_bit_keep_the_others_fine() -> None:
    x, given, weight = problem([3, 17])
    x, exact_weight = x.double(), weight.double()
    exact = x @ exact_weight.t()
    _, missed, _ = problem([3])  # one outlier column is not listed: near miss
    errors = []
    for arguments in (given, missed):
        doubled = {k: v.double() if v.is_floating_point() else v for k, v in arguments.items()}
        errors.append(float((linear_llm_int8(x, **doubled) - exact).abs().max()))
    fine, coarse = errors
    assert fine < 0.2  # 21 products, of half a step of 3/127 and of 3/127 each at worst
    assert coarse > 20 * fine


def test_no_outliers() -> None:
    x, given, _ = problem([])
    got = operator(x, **given)
    int8 = torch.ops.planish.linear_w8a8(x, given["weight"], given["weight_scale"])
    assert torch.equal(got, int8)


def test_one_matmul_after_the_codes() -> None:
    x, given, _ = problem([3, 17])
    launches = plan(x, **given).launches
    assert [launch.name for launch in launches] == [
        "rows_to_codes_kernel",
        "linear_llm_int8_kernel",
    ]
    assert launches[1].args["outliers"] == 2
    assert launches[0].args["REGULAR"] is given["regular"]


def test_refusals() -> None:
    x, given, _ = problem([3, 17])

    def refused(word: str, **changed: Any) -> bool:
        return word in str(why_not("sm_80", **{"x": x, **given, **changed}))

    assert why_not("sm_80", x, **given) is None
    assert refused("float32", x=x.float(), outlier_weight=given["outlier_weight"].float())
    assert refused("outliers' weights", x=x.bfloat16())
    assert refused("outliers' weights", outlier_weight=given["outlier_weight"][:, :1])
    assert refused("list of outlier", outliers=given["outliers"].long())
    assert refused("regular columns", regular=given["regular"].bool())
    assert refused("scales", weight_scale=given["weight_scale"][:1])
    assert refused("weight is", weight=given["weight"].float())


def test_cost_has_the_outliers_product() -> None:
    x, given, _ = problem([3, 17])
    made = cost(x, **given)
    assert made.flops == 2 * 5 * 7 * 23 + 2 * 5 * 7 * 2
    parameters = 7 * 23 + 4 * 7 + 4 * 2 + 2 * 7 * 2 + 23
    assert made.nbytes == 2 * 5 * 23 + 2 * 5 * 23 + 2 * 5 * 7 + parameters
