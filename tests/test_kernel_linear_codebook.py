"""Linear layers on weights coded by a table: packing, the operation and its refusals."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from planish.ir.gpu_layouts import FieldWords
from planish.kernels.linear_codebook import SPEC, PackedCodebook, pack, plan, why_not
from planish.kernels.linear_codebook_cases import FP4, NF4


def made(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes(entries: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, entries, shape, generator=generator).to(torch.uint8)


def arguments(packed: PackedCodebook, x: torch.Tensor) -> dict[str, Any]:
    return {"x": x, **{name: getattr(packed, name) for name in asdict(packed)}}


@pytest.mark.parametrize("entries", [16, 256])
@pytest.mark.parametrize("each", [False, True])
def test_the_twin_looks_every_weight_up(entries: int, each: bool) -> None:
    held, scale = codes(entries, 5, 150), made(5, 3)
    table = made(5, 3, entries, seed=2) if each else made(entries, seed=2)
    x = made(4, 150, seed=3).double()
    expected = torch.zeros(4, 5, dtype=torch.float64)
    for n in range(5):
        for k in range(150):
            entry = table[n, k // 64] if each else table
            weight = entry[int(held[n, k])].double() * scale[n, k // 64].double()
            expected[:, n] += x[:, k] * weight
    found = SPEC.twin(**arguments(pack(held, scale, table, 64), x))
    assert (found - expected).abs().max() <= 1e-12


def test_double_quantization_counts_blocks_along_the_rows() -> None:
    rows, groups = 100, 6
    level, second, offset = codes(256, rows, groups), made(3).abs(), torch.tensor([0.25])
    steps = torch.linspace(-1, 1, 256)
    flat = steps[level.flatten().long()] * second.repeat_interleave(256)[: rows * groups] + offset
    held, table, x = codes(16, rows, 384), torch.tensor(NF4), made(2, 384, seed=3)
    single = SPEC.twin(**arguments(pack(held, flat.view(rows, groups), table, 64), x))
    packed = pack(held, level, table, 64, steps, second, offset)
    found = SPEC.twin(**arguments(packed, x))
    assert (found - single).abs().max() <= 384 * 2**-23 * single.abs().max()
    near = SPEC.twin(**arguments(pack(held, level, table, 64, steps, second.flip(0), offset), x))
    assert (near - single).abs().max() > 0.01


def test_packing_loses_nothing() -> None:
    held, scale = codes(16, 7, 200), made(7, 4)
    packed = pack(held, scale, torch.tensor(FP4), 64)
    assert torch.equal(FieldWords(4, packed.words.shape[-1]).unpack(packed.words, 200), held)
    assert torch.equal(packed.scale.t(), scale)


def test_the_normal_float_is_what_the_paper_prints() -> None:
    assert len(NF4) == 16
    assert sorted(NF4) == list(NF4)
    assert (NF4[0], NF4[7], NF4[15]) == (-1.0, 0.0, 1.0)


def test_the_operator_is_registered_and_has_a_shape_rule() -> None:
    args = arguments(pack(codes(16, 6, 96), made(6, 2), torch.tensor(NF4), 64), made(3, 96))
    operator = torch.ops.planish.linear_codebook
    assert torch.equal(operator(**args), SPEC.twin(**args))
    torch.library.opcheck(operator.default, tuple(args.values()))


def test_the_table_is_read_in_the_dtype_of_the_activations() -> None:
    packed = pack(codes(16, 6, 96), made(6, 2), torch.tensor(NF4), 64)
    launch = plan(**arguments(packed, made(3, 96).half())).launches[0]
    assert launch.args["BOOK"].dtype == torch.float16
    assert not launch.constants["BOOKS"]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"table": torch.zeros(32)}, "its table has 32 entries"),
        ({"table": torch.zeros(6, 2, 16)}, "its tables have the shape [6, 2, 16]"),
        ({"table": torch.zeros(2, 6, 16)}, None),
        ({"scale": torch.zeros(6, 2)}, "its scales have the shape [6, 2]"),
        ({"scale": torch.zeros(2, 6, dtype=torch.uint8)}, "its scales are torch.uint8"),
        ({"scale_table": torch.zeros(256)}, "its scales are torch.float32"),
        ({"group": 24}, "its groups of 24 are no multiple of the layout's runs"),
        ({"x": torch.zeros(3, 96).double()}, "its activations are torch.float64"),
        ({"x": torch.zeros(3, 300)}, "its words are torch.int16 [1, 1, 6, 32] for 300 columns"),
    ],
)
def test_what_it_cannot_take(changed: dict[str, Any], reason: str | None) -> None:
    args = arguments(pack(codes(16, 6, 96), made(6, 2), torch.tensor(NF4), 64), made(3, 96))
    assert why_not("sm_80", **{**args, **changed}) == reason
