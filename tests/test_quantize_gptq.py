"""GPTQ: equal to OBQ in a fixed order, better than rounding to nearest, exact on the grid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from captured import captured
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.ir.affine import grouped
from planish.ir.capture import capture_module
from planish.ir.encoded import Encoded
from planish.ir.errors import CorruptFile, NonFiniteActivation, WrongOption, WrongOrder
from planish.ir.formats import parse_format
from planish.ir.hessian import Hessian, damped, inverse_factor, output_error
from planish.ir.interpret import run
from planish.ir.numerics import sqnr
from planish.ir.program import Program
from planish.ir.text import program_text
from planish.passes.descend_columns import descend
from planish.passes.gptq_columns import gptq
from planish.passes.group_grids import GroupGrids
from planish.passes.obq_columns import obq
from planish.passes.pipeline import Pipeline
from planish.passes.quantize_gptq import QuantizeGptq
from planish.passes.quantize_obq import QuantizeObq
from planish.passes.quantize_weights import QuantizeWeights
from tiny_stack import Stack
from torch import Tensor

ROWS, WIDTH = 7, 40


def random_problem(seed: int, width: int = WIDTH, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """A weight [7, width] and the second moments [width, width] of correlated inputs."""
    made = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=made)
    sizes = torch.rand(width, generator=made) * 3 + 0.1
    inputs = torch.randn(tokens, width, generator=made) @ mix * sizes
    found = Hessian(width)
    found.add(inputs)
    return torch.randn(ROWS, width, generator=made), damped(found.mean(), 0.01)[0]


def grids_for(name: str, width: int = WIDTH) -> GroupGrids:
    return GroupGrids(parse_format(name), width, torch.float32, "w")


def error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    return float(output_error((rounded - weight).double(), hessian).sum())


def test_moments_are_those_of_a_product_and_the_upper_blocks_suffice() -> None:
    rows = torch.randn(900, 600, generator=torch.Generator().manual_seed(1))
    found = Hessian(600)
    for part in rows.split(300):
        found.add(part)
    exact = rows.double().t() @ rows.double() / 900
    assert found.tokens == 900
    # float32 sums of 900 products: each within 900 roundings of the size of its terms
    bound = 900 * torch.finfo(torch.float32).eps * (rows.abs().t() @ rows.abs()) / 900
    assert bool(((found.mean() - exact).abs() <= bound).all())


@pytest.mark.parametrize("width", [40, 600])
def test_the_factor_is_upper_triangular_and_squares_to_the_inverse(width: int) -> None:
    _, hessian = random_problem(3, width, 3 * width)
    factor = inverse_factor(hessian)
    assert torch.equal(factor, factor.triu())
    gap = factor.t() @ factor @ hessian - torch.eye(width, dtype=torch.float64)
    assert gap.abs().max() < 1e-9


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.sampled_from([2, 3, 4]), sym=st.booleans())
def test_gptq_is_obq_in_a_fixed_order(seed: int, bits: int, sym: bool) -> None:
    weight, hessian = random_problem(seed)
    name = f"int{bits}-g8-{'sym' if sym else 'asym'}"
    grids = grids_for(name)
    fast = gptq(weight, hessian, grids, act_order=False)
    slow = obq(weight, hessian, grids, order=torch.arange(WIDTH))
    # Codes may only part where a value lies within float32's rounding of the middle of two.
    assert error(weight, fast, hessian) == pytest.approx(error(weight, slow, hessian), rel=0.02)
    assert float((fast.double() - slow).abs().gt(1e-3).double().mean()) <= 0.02


def to_nearest(weight: Tensor, grids: GroupGrids) -> Tensor:
    size = grids.size
    columns = [grids.nearest(c // size, weight[:, c]) for c in range(weight.shape[1])]
    found = torch.stack(columns, dim=1)
    # The fast rounding of a column is the format's own.
    whole = grids.grid().nearest(grouped(weight, size)).flatten(1)[:, : weight.shape[1]]
    assert (found - whole).abs().max() <= 1e-5 * weight.abs().max()
    return found


BEATEN = ["int4-g8-sym", "int3-g8-asym", "int4-channel-sym", "int3-g8-offset-f16", "mxfp4", "nf4"]


@pytest.mark.parametrize("name", BEATEN)
def test_gptq_beats_rounding_to_the_same_grid_and_descending_never_hurts(name: str) -> None:
    ratios: list[float] = []
    for seed in range(12):
        weight, hessian = random_problem(seed)
        grids = grids_for(name)
        found = gptq(weight, hessian, grids)
        nearest = error(weight, to_nearest(weight, grids), hessian)
        first = error(weight, found, hessian)
        ratios.append(first / nearest)
        swept = descend(weight, found, hessian, grids, 3)
        encoded = grids.format.encode_on(swept, grids.grid()).decode()
        assert (encoded - swept).abs().max() <= 1e-5 * weight.abs().max()
        assert error(weight, swept, hessian) <= first * (1 + 1e-5)
    assert max(ratios) < 1
    assert sum(ratios) / len(ratios) < 0.7


def test_large_inputs_first_beats_the_greedy_order_of_obq_and_that_beats_rounding() -> None:
    gains: list[tuple[float, float]] = []
    for seed in range(8):
        weight, hessian = random_problem(seed)
        grids = grids_for("int3-g8-sym")
        ordered = error(weight, gptq(weight, hessian, grids), hessian)
        greedy = error(weight, obq(weight, hessian, grids), hessian)
        nearest = error(weight, to_nearest(weight, grids), hessian)
        gains.append((ordered / greedy, greedy / nearest))
    assert sum(first for first, _ in gains) / len(gains) < 0.9
    assert max(second for _, second in gains) < 1


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("static_groups", [True, False])
@pytest.mark.parametrize(
    "name", ["int4-g8-sym", "int4-g16-asym", "int8-channel-sym", "int4-g8-offset"]
)
def test_weights_on_a_grid_stay(name: str, act_order: bool, static_groups: bool) -> None:
    weight, hessian = random_problem(4)
    on_grid = parse_format(name).encode(weight).decode()
    grids = grids_for(name)
    found = gptq(on_grid, hessian, grids, act_order=act_order, static_groups=static_groups)
    assert (found - on_grid).abs().max() <= 1e-6 * weight.abs().max()
    found = descend(on_grid, found, hessian, grids, 2)
    assert (found - on_grid).abs().max() <= 1e-5 * weight.abs().max()


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_constant_weights_stay(value: float) -> None:
    _, hessian = random_problem(6)
    weight = torch.full((ROWS, WIDTH), value)
    grids = grids_for("int4-g8-sym")
    found = descend(weight, gptq(weight, hessian, grids), hessian, grids, 1)
    assert (found - weight).abs().max() <= 1e-6 * abs(value)


def stack() -> Program:
    return capture_module(Stack(31, 48).eval(), (torch.arange(10).reshape(2, 5),))


def texts(count: int = 6, length: int = 40) -> list[list[Tensor]]:
    made = torch.Generator().manual_seed(11)
    return [[torch.randint(0, 31, (2, length), generator=made)] for _ in range(count)]


def quantize(program: Program, batches: list[list[Tensor]], **options: object) -> Program:
    given = {"bits": 3, "group_size": 16, "remainder": "short"} | options
    line = Pipeline([QuantizeGptq().with_options(given)], verify="numbers")
    return line.run(program, calibration=batches)


def formats(program: Program) -> dict[str, str]:
    entries = {name: program.weights.entry(name) for name in program.weights}
    return {n: f"{e.format.name}@{e.axis}" for n, e in entries.items() if isinstance(e, Encoded)}


def output_noise(before: Program, after: Program) -> float:
    flat = texts(2)[1]
    return sqnr(run(before, flat, float64=True)[0], run(after, flat)[0])


def test_the_graph_stays_and_outputs_are_nearer_than_by_rounding_to_nearest() -> None:
    before, batches = stack(), texts()
    after = quantize(before, batches)
    assert program_text(before) == program_text(after)
    spelled = "int3-g16-sym-f32"
    assert formats(after) == {
        "up.weight": f"{spelled}@-1",
        "gate.weight": f"{spelled}@-1",
        "down": f"{spelled}@-2",
        "last.weight": f"{spelled}@-1",
    }
    plain = QuantizeWeights(bits=3, group_size=16, remainder="short")
    rounded = Pipeline([plain]).run(before)
    assert output_noise(before, after) > output_noise(before, rounded) + 3


def test_dead_channels_and_short_calibration_are_told() -> None:
    record = quantize(stack(), texts(1, 20)).history.records[-1]
    notes = {a.before: a.note for a in record.applied}
    assert "1 dead input channels" in notes["up.weight"]
    assert "only 40 calibration tokens for 48 inputs" in notes["up.weight"]


def test_a_singular_hessian_is_damped_and_told() -> None:
    record = quantize(stack(), texts(1, 20), damp=0.0).history.records[-1]
    notes = {a.before: a.note for a in record.applied}
    assert "singular Hessian, damped by" in notes["down"]


def test_the_correction_for_upstream_error_helps() -> None:
    before, batches = stack(), texts()
    without = output_noise(before, quantize(before, batches, bits=2))
    assert output_noise(before, quantize(before, batches, bits=2, upstream=1.0)) > without


def test_a_model_in_bfloat16() -> None:
    before = capture_module(Stack(31, 48).eval().bfloat16(), (torch.arange(10).reshape(2, 5),))
    after = quantize(before, texts(), scale_dtype="weight")
    entry = after.weights.entry("up.weight")
    assert isinstance(entry, Encoded)
    assert entry.dtype == entry.scale.dtype == torch.bfloat16
    plain = QuantizeWeights(bits=3, group_size=16, remainder="short", scale_dtype="weight")
    rounded = Pipeline([plain]).run(before)
    assert output_noise(before, after) > output_noise(before, rounded)


def test_overrides() -> None:
    after = quantize(stack(), texts(), overrides="up=int8-g8-sym; last=none")
    assert formats(after)["up.weight"] == "int8-g8-sym@-1"
    assert "last.weight" not in formats(after)


@pytest.mark.parametrize(
    "name", ["nf4", "mxfp4", "ternary-channel", "fp8-e4m3-tensor", "int3-channel-offset"]
)
def test_formats_other_than_integers_gain_as_well(name: str) -> None:
    before = stack()
    after = quantize(before, texts(), format=name)
    assert {spelled.partition("@")[0] for spelled in formats(after).values()} == {name}
    plain = Pipeline([QuantizeWeights(format=name, remainder="short")]).run(before)
    assert output_noise(before, after) > output_noise(before, plain)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "t5"])
def test_real_graphs(name: str) -> None:
    before = captured(name)
    after = quantize(before, [list(before.examples)], bits=4)
    plain = Pipeline([QuantizeWeights(bits=4, group_size=16, remainder="short")]).run(before)
    assert formats(after).keys() == formats(plain).keys()
    flat = list(before.examples)
    exact = run(before, flat, float64=True)[0]
    assert sqnr(exact, run(after, flat)[0]) > sqnr(exact, run(plain, flat)[0])


def test_stacks_of_experts_are_rounded_to_nearest_and_told() -> None:
    before = captured("mixtral")
    record = quantize(before, [list(before.examples)]).history.records[-1]
    told = [a.before for a in record.applied if "rounded to nearest: no single input" in a.note]
    assert told
    assert all("experts" in name for name in told)


def test_a_weight_that_meets_several_values_is_solved_once_for_all_of_them() -> None:
    class Twice(Stack):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            return self.last((self.up(x) + self.up(torch.sin(3 * x))).relu() @ self.down)

    before = capture_module(Twice(31, 48).eval(), (torch.arange(10).reshape(2, 5),))
    after = quantize(before, texts())
    plain = Pipeline([QuantizeWeights(bits=3, group_size=16, remainder="short")]).run(before)
    assert [a.before for a in after.history.records[-1].applied].count("up.weight") == 1
    assert output_noise(before, after) > output_noise(before, plain)


def test_an_interrupted_calibration_goes_on_from_the_last_finished_site(tmp_path: Path) -> None:
    before, batches = stack(), texts()
    whole = quantize(before, batches)
    folder = str(tmp_path / "kept")

    def stop(done: int, total: int, what: str) -> None:
        if done == 2 and what != "done":
            raise KeyboardInterrupt

    step = QuantizeGptq(bits=3, group_size=16, remainder="short", checkpoint=folder)
    with pytest.raises(KeyboardInterrupt):
        Pipeline([step], progress=stop).run(before, calibration=batches)
    (kept,) = Path(folder).iterdir()
    assert len(list(kept.iterdir())) == 2
    first = {file: file.stat().st_mtime_ns for file in kept.iterdir()}
    again = Pipeline([step]).run(before, calibration=batches)
    assert len(list(kept.iterdir())) == 3
    assert all(file.stat().st_mtime_ns == time for file, time in first.items())
    for name in formats(whole):
        assert again.weights.entry(name) == whole.weights.entry(name)
    Pipeline([step]).run(before, calibration=texts(5))
    assert len(list(Path(folder).iterdir())) == 2
    next(iter(kept.iterdir())).write_bytes(b"short")
    with pytest.raises(CorruptFile, match="delete it"):
        Pipeline([step]).run(before, calibration=batches)


def test_bad_options_and_bad_activations() -> None:
    with pytest.raises(WrongOption, match=r"quantize_gptq\.upstream is out of range"):
        QuantizeGptq(upstream=1.5)
    with pytest.raises(WrongOrder, match="needs calibration batches"):
        Pipeline([QuantizeGptq()]).run(stack())
    program = stack()
    program.weights["table.weight"] = program.weights["table.weight"] * float("nan")
    with pytest.raises(NonFiniteActivation, match=r"repair the weight table\.weight"):
        quantize(program, texts())


def test_obq_as_a_pass_on_a_small_model() -> None:
    before = stack()
    step = QuantizeObq(bits=3, group_size=16, remainder="short")
    after = Pipeline([step]).run(before, calibration=texts())
    plain = Pipeline([QuantizeWeights(bits=3, group_size=16, remainder="short")]).run(before)
    assert output_noise(before, after) > output_noise(before, plain)
