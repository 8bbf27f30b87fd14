"""Salient weights stay in 16 bits: chosen by activations, told where they cannot be."""

from __future__ import annotations

import pytest
import torch
from planish.ir.capture import capture_module
from planish.ir.encoded import Encoded
from planish.ir.errors import UnsupportedGroupSize, WrongOption
from planish.ir.format_columns import PLACES
from planish.ir.formats import parse_format
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.passes.pipeline import Pipeline
from planish.passes.quantize_salient import QuantizeSalient
from planish.passes.quantize_weights import QuantizeWeights
from torch import Tensor, nn

LOUD = (3, 41, 77)
"""Channels of the input that are 30 times as large as the others."""


class Loud(nn.Module):
    """A linear and a product with an [in, out] matrix on inputs of which few channels are large."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(96, 40)
        self.mix = nn.Parameter(torch.randn(96, 24) / 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.up(x), x @ self.mix


def inputs(seed: int, tokens: int = 64) -> Tensor:
    x = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(seed))
    x[:, LOUD] *= 30
    return x


@pytest.fixture(scope="module")
def program() -> Program:
    return capture_module(Loud(), (inputs(0),))


def quantized(program: Program, step: QuantizeSalient | QuantizeWeights) -> Program:
    batches = [[inputs(seed)] for seed in (1, 2)]
    return Pipeline([step], verify="structure").run(program, calibration=batches)


def error(program: Program, other: Program) -> float:
    """Mean squared error of all outputs on inputs that calibration has not seen."""
    pairs = zip(run(program, [inputs(9)]), run(other, [inputs(9)]), strict=True)
    return sum(float((a - b).square().mean()) for a, b in pairs)


def test_the_loud_columns_are_kept(program: Program) -> None:
    found = quantized(program, QuantizeSalient(bits=3, group_size=32, fraction=0.03))
    for name in ("up.weight", "mix"):
        entry = found.weights.entry(name)
        assert isinstance(entry, Encoded)
        assert entry.parts[PLACES].tolist() == list(LOUD)
        assert entry.format.name == "int3-g32-sym-f32+columns3%"
    plain = quantized(program, QuantizeWeights(bits=3, group_size=32))
    assert error(program, found) < 0.1 * error(program, plain)


def test_single_values_by_their_effect(program: Program) -> None:
    """Nearly all that the loud columns hold is kept; by magnitude alone hardly any of it is."""
    options = {"bits": 3, "group_size": 32, "keep": "values", "fraction": 0.03}
    found = quantized(program, QuantizeSalient(**options))
    by_weight = quantized(program, QuantizeSalient(**options, by="weights"))
    assert found.weights.entry("up.weight").format.name == "int3-g32-sym-f32+sparse3%"
    assert error(program, found) < 0.5 * error(program, by_weight)


def test_any_base_format(program: Program) -> None:
    found = quantized(program, QuantizeSalient(format="nf4-g32", fraction=0.03))
    assert found.weights.entry("mix").format == parse_format("nf4-g32+columns3%")
    plain = quantized(program, QuantizeWeights(format="nf4-g32"))
    assert error(program, found) < 0.1 * error(program, plain)


def test_without_calibration_by_the_weights(program: Program) -> None:
    step = QuantizeSalient(by="weights", group_size=32)
    found = Pipeline([step], verify="structure").run(program)
    entry = found.weights.entry("up.weight")
    norms = program.weights["up.weight"].norm(dim=0)
    assert entry.parts[PLACES].tolist() == [int(norms.argmax())]


def test_a_table_is_quantized_whole_and_told() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(50, 64)
            self.head = nn.Linear(64, 50, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids))

    ids = torch.zeros(2, 7, dtype=torch.int64)
    program = capture_module(Tied(), (ids,))
    step = QuantizeSalient(bits=8, embeddings="int8-channel-sym")
    found = Pipeline([step], verify="structure").run(program, calibration=[[ids]])
    declined = found.history.records[-1].declined
    assert any("looked up: nothing is kept" in d.reason for d in declined)
    assert found.weights.entry("table.weight").format.name == "int8-channel-sym"


def test_wrong_options() -> None:
    with pytest.raises(WrongOption, match="keep cannot be 'rows'"):
        QuantizeSalient(keep="rows")
    with pytest.raises(WrongOption, match="out of range"):
        QuantizeSalient(fraction=0.9)


def test_a_width_that_groups_do_not_divide_is_refused(program: Program) -> None:
    with pytest.raises(UnsupportedGroupSize):
        quantized(program, QuantizeWeights(format="int4-g64-sym+columns1%"))
