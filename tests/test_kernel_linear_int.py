"""Linear layers on integer weights: packing, the operation, its launches and its refusals."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from planish.ir.formats import parse_format
from planish.kernels.linear_field_plan import FIELD_CONFIGS, choose
from planish.kernels.linear_int import SPEC, decoded, pack, plan, run_of, why_not, why_not_pack

FORMATS = [
    "int2-g64-asym", "int3-g32-sym", "int4-g128-sym", "int4-g48-asym", "int4-channel-asym",
    "int5-g16-asym", "int6-channel-sym", "int8-channel-sym", "int8-g32-asym-f32",
]  # fmt: skip


def made(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arguments(name: str, rows: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    encoded = parse_format(name).encode(made(40, 200).to(dtype))
    packed = pack(encoded)
    parts = {field: getattr(packed, field) for field in ("words", "scale", "zero", "bits", "group")}
    return {"x": made(rows, 200, seed=1).to(dtype), **parts}


@pytest.mark.parametrize("name", FORMATS)
def test_packing_loses_nothing(name: str) -> None:
    encoded = parse_format(name).encode(made(40, 200))
    packed = pack(encoded)
    found = decoded(**asdict(packed), length=200)
    assert torch.equal(found, encoded.decode())


@pytest.mark.parametrize("name", FORMATS)
def test_the_twin_multiplies_the_decoded_weight(name: str) -> None:
    encoded = parse_format(name).encode(made(40, 200).double())
    packed = pack(encoded)
    x = made(5, 200, seed=1).double()
    found = SPEC.twin(x, **asdict(packed), bias=made(40, seed=2).double(), activation="relu")
    expected = torch.relu(x @ encoded.decode().T + made(40, seed=2).double())
    assert (found - expected).abs().max() <= 200 * 2**-52 * expected.abs().max() * 8


def test_a_wrong_zero_point_shows() -> None:
    args = arguments("int4-g48-asym")
    right = SPEC.twin(**args)
    args["zero"] = args["zero"] + 1
    assert (SPEC.twin(**args) - right).abs().max() > 0.01


def test_the_operator_is_registered_and_has_a_shape_rule() -> None:
    args = arguments("int4-g64-asym")
    operator = torch.ops.planish.linear_int
    assert torch.equal(operator(**args), SPEC.twin(**args))
    torch.library.opcheck(operator.default, tuple(args.values()))


@pytest.mark.parametrize(
    ("group", "length", "bits", "run"),
    [
        (128, 4096, 4, 32),
        (4096, 4096, 3, 32),
        (48, 4096, 4, 16),
        (16, 4096, 2, 16),
        (11008, 11008, 3, 32),  # 21.5 blocks of 512: 2.3 % filled up
        (64, 576, 3, 16),  # 576 of 1,024 columns, against 576 of 768
    ],
)
def test_the_run_divides_the_groups_and_fills_little_up(
    group: int, length: int, bits: int, run: int
) -> None:
    assert run_of(group, length, bits) == run


@pytest.mark.parametrize(
    ("name", "together", "runs"),
    [
        ("int4-g128-sym", 4, 4),
        ("int4-g64-asym", 2, 2),
        ("int4-g32-sym", 1, 1),
        ("int4-g48-asym", 1, 3),
        ("int4-channel-asym", 4, 0),
        ("int8-g32-asym-f32", 2, 2),  # runs of 16: less to fill up
    ],
)
def test_products_are_added_before_they_are_scaled(name: str, together: int, runs: int) -> None:
    launch = plan(**arguments(name)).launches[0]
    assert (launch.constants["TOGETHER"], launch.constants["GROUP"]) == (together, runs)


@pytest.mark.parametrize(("rows", "tile"), [(1, 8), (8, 8), (9, 16), (16, 16), (17, 64)])
def test_few_rows_take_low_tiles_and_are_split(rows: int, tile: int) -> None:
    launches = plan(**arguments("int4-g128-sym", rows, torch.float16)).launches
    assert launches[0].constants["BM"] == tile
    assert len(launches) == (2 if rows <= 16 else 1)


def test_float32_takes_few_rows_at_a_time() -> None:
    args = arguments("int4-g128-sym", 100)
    assert plan(**args).launches[0].constants["BM"] == 32


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942", "gfx1100"])
@pytest.mark.parametrize("rows", [1, 64, 5000])
def test_every_architecture_has_a_configuration(arch: str, rows: int) -> None:
    config = choose(rows, 4096, arch)
    assert config in FIELD_CONFIGS
    assert config.serves(arch)
    assert rows > 16 or rows <= config.constants["BM"]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"activation": "silu", "precision": "tf32", "bias": torch.zeros(40)}, None),
        ({"bits": 5}, "there is no kernel for 5 bits"),
        ({"bits": 8}, "its words are torch.int16 [2, 1, 40, 32] for 200 columns"),
        ({"group": 40}, "its groups of 40 are no multiple of the layout's runs"),
        ({"scale": torch.ones(3, 40)}, "its scales have the shape [3, 40]"),
        ({"zero": torch.ones(40, 4, dtype=torch.uint8)}, "its zero points have the shape [40, 4]"),
        ({"x": torch.zeros(3, 300)}, "its words are torch.int16 [2, 1, 40, 32] for 300 columns"),
        ({"x": torch.zeros(3, 200).double()}, "its activations are torch.float64"),
        ({"precision": "fast"}, "there is no precision fast"),
        ({"activation": "tanh"}, "there is no kernel for the activation tanh"),
    ],
)
def test_what_it_cannot_take(changed: dict[str, Any], reason: str | None) -> None:
    assert why_not("sm_80", **{**arguments("int4-g64-asym"), **changed}) == reason


def test_words_off_16_bytes_are_refused() -> None:
    args = arguments("int4-g64-asym")
    held = torch.zeros(args["words"].numel() + 1, dtype=torch.int16)
    args["words"] = held[1:].view(args["words"].shape)
    assert why_not("sm_80", **args) == "its words do not start on 16 bytes"


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("int4-g64-sym", (8, 128), None),
        ("int4-g40-sym", (8, 128), "its groups of 40 are no multiple of 16"),
        ("int4-g40-sym", (8, 40), None),
        ("int4-g32-sym", (2, 8, 64), "it is a stack of matrices [2, 8, 64]"),
        ("int4-g32-sym-f64", (8, 64), "its scales are float64, and the kernel computes in float32"),
    ],
)
def test_what_has_no_layout(name: str, shape: tuple[int, ...], reason: str | None) -> None:
    assert why_not_pack(parse_format(name).encode(made(*shape))) == reason


def test_cost_counts_packed_bytes() -> None:
    args = arguments("int4-g64-asym", dtype=torch.float16)
    cost = SPEC.cost(**args)
    words, groups = 2 * 2 * 40 * 32, 4 * 40
    assert cost.nbytes == words + groups * 2 + groups + 2 * 3 * (200 + 40)
    assert cost.flops == 2 * 3 * 40 * 200
