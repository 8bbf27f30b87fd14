"""Pruned weights that are quantized afterwards: GPTQ keeps their zeros, and makes up for them."""

from __future__ import annotations

import pytest
import torch
from captured import captured
from planish.ir.capture import capture_module
from planish.ir.encoded import Encoded
from planish.ir.interpret import run
from planish.ir.numerics import sqnr
from planish.ir.program import Program
from planish.ir.sparsity_patterns import parse_sparsity
from planish.passes.drop_dead import DropDead
from planish.passes.fuse_gate_up import FuseGateUp
from planish.passes.fuse_qkv import FuseQkv
from planish.passes.pack_sparse import PackSparse
from planish.passes.pipeline import Pipeline
from planish.passes.prune_sparsegpt import PruneSparsegpt
from planish.passes.quantize_gptq import QuantizeGptq
from planish.passes.quantize_weights import QuantizeWeights
from planish.passes.smooth import Smooth
from planish.recipes import pipeline
from torch import Tensor, nn

NAMES = {"up.weight": -1, "down": -2}
PATTERN = parse_sparsity("2:4", "x")


class Stack(nn.Module):
    """A table, a linear and a transposed weight; the last stays dense."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.table, self.up = nn.Embedding(31, 48), nn.Linear(48, 80)
        self.down = nn.Parameter(torch.randn(80, 36) / 9)
        self.last = nn.Linear(36, 31)

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(torch.tanh(self.up(self.table(ids))) @ self.down)


def texts(count: int = 6, length: int = 40) -> list[list[Tensor]]:
    made = torch.Generator().manual_seed(11)
    return [[torch.randint(0, 31, (2, length), generator=made)] for _ in range(count)]


@pytest.fixture(scope="module")
def pruned() -> Program:
    before = capture_module(Stack().eval(), (torch.arange(10).reshape(2, 5),))
    step = PruneSparsegpt(sparsity="2:4", skip="last.*")
    return Pipeline([step]).run(before, calibration=texts())


def gptq(program: Program, **options: object) -> Program:
    given = {"bits": 4, "group_size": 16, "remainder": "short"} | options
    return Pipeline([QuantizeGptq().with_options(given)]).run(program, calibration=texts())


def noise(program: Program, reference: Program) -> float:
    flat = texts(2)[1]
    return sqnr(run(reference, flat, float64=True)[0], run(program, flat)[0])


def kept(program: Program, reference: Program) -> bool:
    """Whether all zeros of the pruned weights are zeros still."""
    return all(not program.weights[n][reference.weights[n] == 0].any() for n in NAMES)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"act_order": False},
        {"static_groups": False},
        {"symmetric": False},
        {"upstream": 0.5},
        {"sweeps": 0},
        {"format": "nf4-g16"},
        {"format": "mxfp4"},
    ],
)
def test_zeros_stay_and_the_rest_makes_up_for_them(
    pruned: Program, options: dict[str, object]
) -> None:
    found = gptq(pruned, **options)
    assert kept(found, pruned)
    assert not kept(gptq(pruned, **options, keep_zeros=False), pruned)
    for name, axis in NAMES.items():
        rows = found.weights[name].movedim(axis, -1)
        assert PATTERN.holds(rows)


def test_it_is_better_than_to_round_to_nearest(pruned: Program) -> None:
    plain = Pipeline([QuantizeWeights(bits=4, group_size=16, remainder="short")]).run(pruned)
    assert kept(plain, pruned), "symmetric grids hold zero"
    assert noise(gptq(pruned), pruned) > noise(plain, pruned)


def test_a_whole_line_of_passes_keeps_the_zeros() -> None:
    """Smoothing scales whole columns, and fused weights are the rows of several."""
    steps = [
        *pipeline("raise").passes,
        PruneSparsegpt(sparsity="2:4"),
        Smooth(),
        QuantizeGptq(group_size=16, remainder="short"),
        FuseQkv(),
        FuseGateUp(),
        DropDead(),
    ]
    before = captured("llama")
    after = Pipeline(steps, verify="numbers").run(before, calibration=[list(before.examples)])
    pruned = [name for name in after.weights if isinstance(after.weights.entry(name), Encoded)]
    fused = [name for name in pruned if "+" in name]
    assert len(fused) == 4
    for name in pruned:
        if "lm_head" not in name:
            assert PATTERN.holds(after.weights[name])


def test_formats_without_a_zero_lose_them(pruned: Program) -> None:
    assert not kept(gptq(pruned, format="int4-g16-offset"), pruned)


def test_dense_weights_are_rounded_as_before() -> None:
    dense = capture_module(Stack().eval(), (torch.arange(10).reshape(2, 5),))
    for name in dense.weights:
        assert torch.equal(gptq(dense).weights[name], gptq(dense, keep_zeros=False).weights[name])


def test_a_quantized_weight_is_packed_with_its_codes(pruned: Program) -> None:
    coded = gptq(pruned)
    packed = Pipeline([PackSparse()]).run(coded)
    entry = packed.weights.entry("up.weight")
    assert isinstance(entry, Encoded) and entry.format.name == "int4-g16-sym-f32+2:4"
    assert torch.equal(packed.weights["up.weight"], coded.weights["up.weight"])
    (declined,) = packed.history.records[-1].declined
    assert declined.value == "last.weight"  # it was not pruned
    assert declined.reason.startswith("the zeros among its codes of int4-g16-sym-f32 are not two")
