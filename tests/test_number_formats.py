"""Every family of formats: declared errors hold, sizes are known, files and grids round-trip."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.ir import formats as formats_module
from planish.ir.affine import grouped, ungrouped
from planish.ir.capture import capture_module
from planish.ir.double_quantization import dynamic_map
from planish.ir.encoded import Format
from planish.ir.errors import (
    NonFiniteWeight,
    ScaleOverflow,
    UnknownFormat,
    UnsupportedFormat,
    UnsupportedShape,
    WrongOption,
)
from planish.ir.format_fp8 import FP8_ENTRIES
from planish.ir.format_nf4 import FP4, NF4
from planish.ir.formats import families, known_formats, parse_format
from planish.ir.grid import Grid
from planish.ir.numerics import sqnr
from planish.ir.program import Program
from planish.ir.program_folder import load_program, save_program
from planish.ir.stack_encoded import stack_rows
from torch import Tensor, nn

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = st.sampled_from([(1, 7), (5, 3), (3, 70), (2, 5, 33), (4, 96), (37, 2), (9,), (6, 300)])
SIZES = ["channel", "tensor", "g32", "g10"]

NAMES = [
    *("nf4", "nf4-plain", "nf4-g16", "fp4", "fp4-g32-plain"),
    *(f"fp8-{kind}-{size}" for kind in ("e4m3", "e5m2") for size in SIZES),
    *(f"{kind}-{size}" for kind in ("ternary", "binary") for size in SIZES),
    *("ternary-g16-f16", "fp8-e4m3-g16-bf16"),
    *("mxfp4", "mxfp6-e2m3", "mxfp6-e3m2", "mxfp8", "mxfp8-e5m2", "nvfp4"),
    *("int4-g32-offset", "int3-g10-offset-f16", "int2-channel-offset", "int8-g16-offset-bf16"),
    *("int4-g32-offset-k", "int5-g8-offset-k"),
    *("kmeans4-tensor", "kmeans2-channel", "kmeans3-g16-f16", "kmeans1-g10"),
    *("gobo3", "gobo2"),
    *("int4-g32-sym+sparse0.5%", "nf4+sparse5%", "int3-channel-asym+sparse1%"),
    *("int4-g32-sym+columns1%", "fp8-e4m3-channel+columns10%"),
    *("2:4", "4:8"),
]
GRIDS = [name for name in NAMES if not any(part in name for part in ("gobo", "+", ":"))]


def seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def weights(draw: st.DrawFn, low: int = -20, high: int = 10) -> Tensor:
    """Gaussian, skewed, sparse or outlier weights of a size 2^low to 2^high, in any dtype."""
    weight = seeded(draw(st.integers(0, 10**6)), *draw(SHAPES))
    kind = draw(st.sampled_from(["gauss", "positive", "offset", "sparse", "outlier", "zero"]))
    if kind == "positive":
        weight = weight.abs()
    elif kind == "offset":
        weight = weight + 5
    elif kind == "sparse":
        weight = weight * (weight.abs() > 1)
    elif kind == "outlier":
        weight.view(-1)[0] = 1000.0
    elif kind == "zero":
        weight = weight * 0
    limited = (weight * 2.0 ** draw(st.integers(low, high))).clamp(-60000, 60000)
    return limited.to(draw(st.sampled_from(FLOATS)))


formats = st.sampled_from(NAMES).map(parse_format)


@pytest.fixture(scope="module")
def linear() -> Program:
    torch.manual_seed(0)
    return capture_module(nn.Linear(70, 12), (torch.randn(3, 70),))


def axis_for(weight: Tensor, last: bool) -> int:
    return -1 if last or weight.dim() < 2 else -2


@settings(max_examples=400, deadline=None)
@given(formats, weights(), st.booleans())
def test_the_error_is_within_the_declared_worst(fmt: Format, weight: Tensor, last: bool) -> None:
    encoded = fmt.encode(weight, axis_for(weight, last))
    decoded = encoded.decode()
    assert (decoded.shape, decoded.dtype) == (weight.shape, weight.dtype)
    assert decoded.is_contiguous()
    assert bool(decoded.isfinite().all())
    error = (weight.double() - decoded.double()).abs()
    bound = encoded.worst_error()
    assert bound.shape == weight.shape
    assert bool((error <= bound).all()), f"{fmt.name}: {(error - bound).max():g} beyond"


@settings(max_examples=150, deadline=None)
@given(formats, weights(), st.booleans())
def test_parts_are_as_declared(fmt: Format, weight: Tensor, last: bool) -> None:
    axis = axis_for(weight, last)
    encoded = fmt.encode(weight, axis)
    declared = fmt.stored(weight.shape, axis, weight.dtype)
    assert declared is not None
    assert declared.keys() == encoded.parts.keys()
    for name, (dtype, sizes) in declared.items():
        part = encoded.parts[name]
        assert part.dtype == dtype, (fmt.name, name)
        assert part.dim() == len(sizes), (fmt.name, name)
        assert all(w in (-1, s) for w, s in zip(sizes, part.shape, strict=True)), (fmt.name, name)
        shared = name in fmt.shared_parts
        assert shared or part.shape[:-1][: weight.dim() - 1] == encoded.rows_shape[:-1]
    if not any(-1 in sizes for _, sizes in declared.values()):
        predicted = fmt.bits_per_weight(weight.shape, axis, weight.dtype)
        assert predicted == encoded.bits_per_weight()


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(GRIDS).map(parse_format), weights(-6, 6), st.booleans())
def test_values_on_a_grid_are_encoded_exactly(fmt: Format, weight: Tensor, last: bool) -> None:
    """Whatever `nearest` gives, `encode_on` keeps; the values of encode lie on such a grid."""
    axis = axis_for(weight, last)
    rows = weight.movedim(axis, -1).reshape(-1, weight.shape[axis])
    groups = grouped(rows.float(), fmt.grouping(rows.shape[1]))
    grid = fmt.grid(groups, dtype=weight.dtype)
    if fmt.groups_apart:
        parts = [fmt.grid(groups[:, g : g + 1], dtype=weight.dtype) for g in range(groups.shape[1])]
        grid = Grid.join(parts)
    nearest = grid.nearest(groups)
    assert torch.equal(grid.of_groups(slice(0, 1)).nearest(groups[:, :1]), nearest[:, :1])
    lead = weight.movedim(axis, -1).shape
    placed = ungrouped(nearest, rows.shape[1]).reshape(lead).movedim(-1, axis)
    kept = fmt.encode_on(placed, grid, axis)
    assert (kept.dtype, kept.format) == (weight.dtype, fmt)
    assert torch.equal(kept.decode(), placed.to(weight.dtype))
    assert torch.equal(kept.decode(torch.float32), placed)
    if not fmt.name.startswith(("nf4", "fp4")):  # their codes are rounded by unrounded maxima
        assert torch.equal(fmt.encode(weight, axis).decode(), kept.decode())


@pytest.mark.parametrize("name", [n for n in GRIDS if not n.startswith(("fp", "mx", "nv", "nf"))])
def test_a_grid_by_importance_loses_no_more(name: str) -> None:
    groups = seeded(1, 12, 1, 32)
    importance = seeded(2, 1, 32).square()
    fmt = parse_format(name)
    plain, chosen = fmt.grid(groups), fmt.grid(groups, importance)
    error = [float(((g.nearest(groups) - groups) ** 2 * importance).sum()) for g in (plain, chosen)]
    searched = "offset" in name or "kmeans" in name
    assert error[1] <= error[0] * (1.0001 if searched and "offset-k" not in name else 1.5)


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_are_apart_can_be_stacked(name: str) -> None:
    fmt = parse_format(name)
    entries = [fmt.encode(seeded(seed, rows, 70)) for seed, rows in ((1, 5), (2, 3))]
    if fmt.rows_apart:
        stacked = stack_rows(entries)
        assert torch.equal(stacked.decode(), torch.cat([entry.decode() for entry in entries]))


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded(linear: Program, name: str, tmp_path: Path) -> None:
    program = linear.copy()
    program.weights["weight"] = parse_format(name).encode(program.weights["weight"])
    loaded = load_program(save_program(program, tmp_path / "saved"))
    assert loaded.weights.entry("weight") == program.weights.entry("weight")


@pytest.mark.parametrize("name", [*NAMES, *known_formats()])
def test_names_round_trip(name: str) -> None:
    assert parse_format(name).name == name
    assert parse_format(name) == parse_format(name)


UNKNOWN = [
    *("nf5", "fp8-e4m3", "ternary", "mxfp5", "mxfp4-g32", "kmeans9-tensor", "gobo9"),
    *("int4-g32-offset-f32", "int4-g0-offset", "int4-g64-sym+sparse%", "nf3+columns1%"),
]


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(UnknownFormat):
        parse_format(name)


@pytest.mark.parametrize("name", ["int4-g64-sym+sparse60%", "nf4+columns0%"])
def test_shares_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(WrongOption, match="out of range"):
        parse_format(name)


@pytest.mark.parametrize("name", NAMES)
def test_bad_weights_are_refused(name: str) -> None:
    fmt = parse_format(name)
    weight = seeded(0, 4, 96)
    weight[2, 70] = float("nan")
    with pytest.raises(NonFiniteWeight):
        fmt.encode(weight, where="layers.0.w")
    with pytest.raises(UnsupportedShape):
        fmt.encode(torch.ones(3, 4, dtype=torch.int8))


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith(("-f16", "-k")) and "+" not in n])
def test_a_scale_that_overflows_names_the_weight(name: str) -> None:
    weight = seeded(0, 4, 96) * 1e9
    if name.startswith("kmeans"):  # entries stay at the largest number there is
        assert bool(parse_format(name).encode(weight).decode().isfinite().all())
        return
    with pytest.raises(ScaleOverflow, match=r"layers\.0\.w"):
        parse_format(name).encode(weight, where="layers.0.w")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("axis", [-1, -2])
def test_blocks_of_rows_change_nothing(
    name: str, axis: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight is worked through in blocks, so that temporary memory does not grow with it."""
    fmt, weight = parse_format(name), seeded(4, 3, 14, 33)
    whole = fmt.encode(weight, axis)
    decoded, bound = whole.decode(), whole.worst_error()
    monkeypatch.setattr("planish.ir.weight_blocks.CHUNK", 100)
    assert torch.equal(fmt.encode(weight, axis).decode(), decoded)
    assert torch.equal(whole.decode(), decoded)
    assert torch.equal(whole.worst_error(), bound)


def test_formats_without_a_grid_say_so() -> None:
    for name in ("gobo3", "int4-g32-sym+sparse1%", "2:4"):
        with pytest.raises(UnsupportedFormat, match="no grid"):
            parse_format(name).grid(seeded(0, 3, 2, 32))


def test_every_file_declares_its_family() -> None:
    folder = Path(str(formats_module.__file__)).parent
    assert {path.stem for path in folder.glob("format_*.py")} == set(families())


# --- each format's own meaning ---


def test_nf4_are_the_quantiles_of_a_gaussian() -> None:
    """QLoRA, sec. 3 and app. E: 8 quantiles of the upper half, 7 of the lower, and zero.

    The published numbers come from scipy's float64 quantiles at the offset 0.9677083.
    """
    normal = torch.distributions.Normal(torch.tensor(0.0).double(), torch.tensor(1.0).double())
    positive = normal.icdf(torch.linspace(0.9677083, 0.5, 9).double()[:-1])
    negative = -normal.icdf(torch.linspace(0.9677083, 0.5, 8).double()[:-1])
    table = torch.cat([negative, torch.zeros(1).double(), positive]).sort().values
    assert torch.allclose(table / table.max(), torch.tensor(NF4).double(), atol=2e-6, rtol=0)


def test_double_quantization_golden() -> None:
    """Block maxima 1, 2, 3: the mean 2 is subtracted, and -1, 0, 1 are coded exactly or nearly."""
    weight = torch.zeros(3, 64)
    weight[:, 5] = torch.tensor([1.0, -2.0, 3.0])
    encoded = parse_format("nf4").encode(weight)
    assert encoded.parts["offset"].tolist() == [2.0]
    assert encoded.parts["second"].tolist() == [1.0]
    assert encoded.parts["scale"].flatten().tolist() == [0, 127, 255]
    assert dynamic_map()[[0, 127, 255]].tolist() == pytest.approx([-0.99296875, 0.0, 1.0])
    assert encoded.codes()[:, 5].tolist() == [15, 0, 15]
    assert encoded.decode()[:, 5].tolist() == pytest.approx([1.00703125, -2.0, 3.0])


def test_nf4_takes_4_127_bits() -> None:
    assert parse_format("nf4").bits_per_weight((4096, 4096)) == pytest.approx(4.127, abs=1e-3)
    assert parse_format("int4-g32-offset-k").bits_per_weight((4096, 4096)) == 4.5
    assert parse_format("ternary-tensor").bits_per_weight((4096, 4095)) == pytest.approx(1.6, 0.01)
    assert parse_format("mxfp4").bits_per_weight((64, 64)) == 4.25
    assert parse_format("nvfp4").bits_per_weight((4096, 4096)) == pytest.approx(4.5, 1e-4)


def test_fp4_entries_are_e2m1_with_a_small_subnormal() -> None:
    assert sorted(FP4)[-7:] == [v / 12 for v in (0.0625, 2, 3, 4, 6, 8, 12)]
    weight = torch.tensor([[12.0, -8, 6, 4, 3, 2]])
    assert torch.allclose(parse_format("fp4-plain").encode(weight).decode(), weight)


@pytest.mark.parametrize(("kind", "dtype"), [("e4m3", torch.float8_e4m3fn),
                                             ("e5m2", torch.float8_e5m2)])  # fmt: skip
def test_fp8_tables_are_torchs(kind: str, dtype: torch.dtype) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    finite = values.isfinite()
    table = torch.tensor(FP8_ENTRIES[kind])
    assert torch.equal(table[finite], values[finite])
    assert bool(table[~finite].isnan().all())


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_fp8_in_float64_rounds_like_torch(kind: str) -> None:
    weight = seeded(3, 8, 70)
    fmt = parse_format(f"fp8-{kind}-channel")
    narrow, wide = fmt.encode(weight), fmt.encode(weight.double())
    assert (narrow.decode() - wide.decode().float()).abs().max() <= 1e-6
    assert sqnr(weight, narrow.decode()) > (30 if kind == "e4m3" else 24)


def test_mx_scales_are_powers_of_two() -> None:
    """OCP v1.0, sec. 6.3: 7 lies between 6 and 8, so it saturates at 6 under a scale of 1."""
    weight = torch.tensor([[7.0, 0.25, 0.75, -5.0, 2.5] + [0.0] * 27])
    encoded = parse_format("mxfp4").encode(weight)
    assert encoded.parts["scale"].tolist() == [[127]]
    assert encoded.decode()[0, :5].tolist() == [6.0, 0.0, 1.0, -4.0, 2.0]


def test_nvfp4_keeps_the_largest_value() -> None:
    weight = seeded(0, 4, 64)
    encoded = parse_format("nvfp4").encode(weight)
    assert encoded.decode().abs().max() == pytest.approx(float(weight.abs().max()), rel=1e-6)


def test_ternary_is_bitnets_rounding() -> None:
    """Ma et al. 2024, sec. 2: round(W / (mean |W|)) clipped to -1 and 1, times the mean."""
    weight = seeded(7, 12, 50) + 0.1
    scale = weight.abs().mean()
    wanted = (weight / scale).round().clamp(-1, 1) * scale
    encoded = parse_format("ternary-tensor").encode(weight)
    assert torch.allclose(encoded.decode(), wanted, rtol=1e-6, atol=0)


def test_binary_is_the_sign_times_the_mean() -> None:
    weight = torch.tensor([[1.0, -3.0, 2.0, -2.0]])
    assert parse_format("binary-channel").encode(weight).decode().tolist() == [[2, -2, 2, -2]]


def test_offsets_reach_both_ends() -> None:
    weight = torch.tensor([[5.0, 8.0, 6.0, 5.5], [3.0, 3.0, 3.0, 3.0]])
    encoded = parse_format("int2-g4-offset").encode(weight)
    assert encoded.decode().tolist() == [[5, 8, 6, 5], [3, 3, 3, 3]]
    assert encoded.parts["offset"].tolist() == [[5], [3]]


def test_kmeans_finds_the_clusters() -> None:
    centres = torch.tensor([-3.0, -1.0, 0.5, 4.0])
    weight = centres[torch.arange(400) % 4].view(10, 40)
    weight = weight + 0.01 * seeded(0, 10, 40)
    for size in ("tensor", "channel", "g20"):
        encoded = parse_format(f"kmeans2-{size}").encode(weight)
        assert (encoded.decode() - weight).abs().max() < 0.06
    assert encoded.parts["table"].shape == (10, 2, 4)


def test_kmeans_beats_the_affine_grid() -> None:
    weight = seeded(5, 64, 96)
    affine = sqnr(weight, parse_format("int4-channel-asym").encode(weight).decode())
    assert sqnr(weight, parse_format("kmeans4-channel").encode(weight).decode()) > affine + 1


def test_gobo_keeps_outliers_exact() -> None:
    weight = 0.04 * seeded(1, 40, 70)
    weight[3, 5], weight[39, 69] = 1.0, -0.7
    encoded = parse_format("gobo3").encode(weight)
    decoded = encoded.decode()
    assert (decoded[3, 5], decoded[39, 69]) == (weight[3, 5], weight[39, 69])
    count = encoded.parts["outlier_values"].numel()
    assert 2 <= count < 0.01 * weight.numel()
    assert len(encoded.parts["table"]) == 8


def test_outliers_do_not_stretch_their_group() -> None:
    weight = seeded(1, 16, 64)
    weight[2, 7] = 100.0
    plain, sparse = (parse_format(name) for name in ("int4-g64-sym", "int4-g64-sym+sparse0.5%"))
    assert sqnr(weight[2], sparse.encode(weight).decode()[2]) > 10 + sqnr(
        weight[2], plain.encode(weight).decode()[2]
    )
    encoded = sparse.encode(weight)
    assert encoded.parts["outlier_rows"].shape == (17,)
    assert encoded.parts["outlier_values"].numel() == round(0.005 * weight.numel())


def test_importance_chooses_outliers_and_columns() -> None:
    weight = seeded(1, 16, 100)
    importance = torch.ones(100)
    importance[37] = 1e6
    sparse = parse_format("int4-g64-sym+sparse1%")
    columns = parse_format("int4-g64-sym+columns1%")
    found = sparse.encode_by(weight, importance)  # type: ignore[attr-defined]
    assert set(found.parts["outlier_columns"].tolist()) == {37}
    kept = columns.encode_by(weight, importance)  # type: ignore[attr-defined]
    assert kept.parts["kept_columns"].tolist() == [37]
    assert torch.equal(kept.decode()[:, 37], weight[:, 37].half().float())
