"""Low-rank adapters by row: the twin against loops, what is refused, how the input is cut."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planish.kernels import lora as kernel
from planish.kernels.lora_cases import CASES

TWIN = kernel.SPEC.twin


def _problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes):
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "y": normal(6, 5),
        "x": normal(6, 9),
        "a": normal(3, 4, 9),
        "b": normal(3, 5, 4),
        "scale": normal(3),
        "adapters": torch.tensor([2, -1, 0, 2, 1, -1], dtype=torch.int32),
    }


def test_twin_is_the_definition():
    args = _problem()
    out = TWIN(**args)
    for i, n in enumerate(args["adapters"].tolist()):
        expected = args["y"][i].clone()
        if n >= 0:
            expected += args["scale"][n] * (args["b"][n] @ (args["a"][n] @ args["x"][i]))
        torch.testing.assert_close(out[i], expected, rtol=0, atol=1e-13)
    assert (out[0] - args["y"][0]).abs().max() > 0.1
    assert torch.equal(out[1], args["y"][1])


def test_order_says_nothing_about_the_result():
    args = _problem()
    order = torch.argsort(args["adapters"], stable=True).int()
    assert torch.equal(TWIN(**args, order=order), TWIN(**args))


@given(
    blocks=st.integers(1, 4000),
    columns=st.integers(1, 30_000),
    step=st.sampled_from([32, 64, 512]),
)
def test_parts_cover_the_input_once(blocks, columns, step):
    steps = -(-columns // step)
    parts = kernel.part_count(blocks, steps, "sm_80")
    assert 1 <= parts <= 16
    assert parts == 1 or parts * 2 <= steps
    share = -(-steps // parts) * step
    ends = [min((p + 1) * share, columns) for p in range(parts)]
    assert ends[-1] == columns
    assert share % step == 0


def _meta(**changes):
    def of(*sizes, dtype=torch.bfloat16):
        return torch.empty(sizes, dtype=dtype, device="meta")

    args = {
        "y": of(4, 48),
        "x": of(4, 64),
        "a": of(3, 16, 64),
        "b": of(3, 48, 16),
        "scale": of(3),
        "adapters": of(4, dtype=torch.int32),
    }
    return args | {name: make(of) for name, make in changes.items()}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"y": lambda of: of(4, 48, dtype=torch.float32)}, None),
        ({"y": lambda of: of(4, 48, dtype=torch.float64)}, "float64"),
        ({"a": lambda of: of(3, 16, 64, dtype=torch.float16)}, "adapters are"),
        ({"a": lambda of: of(3, 128, 64), "b": lambda of: of(3, 48, 128)}, None),
        ({"a": lambda of: of(3, 129, 64), "b": lambda of: of(3, 48, 129)}, "129"),
        ({"adapters": lambda of: of(4, dtype=torch.int64)}, "int32"),
        ({"order": lambda of: of(4, dtype=torch.int64)}, "int32"),
        ({"order": lambda of: of(4, dtype=torch.int32)}, None),
        ({"b": lambda of: of(3, 16, 48).transpose(1, 2)}, "side by side"),
        ({"x": lambda of: of(4, 80)[:, :64]}, None),
        ({"x": lambda of: of(65536, 64), "y": lambda of: of(65536, 48)}, "sorted"),
    ],
)
def test_why_not(changes, said):
    reason = kernel.why_not("sm_80", **_meta(**changes))
    assert reason is None if said is None else said in reason


def test_every_case_is_one_that_the_kernel_takes():
    for case in CASES:
        args = case.make(torch.Generator().manual_seed(0))
        assert kernel.why_not("sm_90", **args) is None, case.name


def test_plan_has_a_form_for_rows_and_one_for_tiles():
    rows = kernel.plan(**_meta())
    assert [launch.name for launch in rows.launches] == [
        "lora_row_shrink_kernel",
        "lora_row_expand_kernel",
    ]
    assert rows.launches[0].grid == (1, 2, 4)  # one part, 16 ranks by eights, four rows
    tiles = kernel.plan(**_meta(order=lambda of: of(4, dtype=torch.int32)))
    assert [launch.name for launch in tiles.launches] == [
        "lora_shrink_kernel",
        "lora_expand_kernel",
    ]
    assert tiles.outputs[0].shape == (4, 48)


def test_cost_counts_an_adapter_once():
    few, many = kernel.cost(**_meta()), kernel.cost(**_meta(x=lambda of: of(2, 64)))
    adapter = 16 * (64 + 48) * 2
    assert few.nbytes == 3 * adapter + 4 * 64 * 2 + 2 * 4 * 48 * 2
    assert many.nbytes == 2 * adapter + 2 * 64 * 2 + 2 * 4 * 48 * 2
    assert few.flops == 2 * 4 * 16 * (64 + 48)


def test_operator_runs_the_twin_and_knows_its_shape():
    args = _problem(torch.float32)
    assert torch.equal(torch.ops.planish.lora(*args.values()), TWIN(**args))
    assert torch.ops.planish.lora(*_meta().values()).shape == (4, 48)
