"""Number formats: the declared worst error holds, zero stays zero, names are invertible."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from planish.ir.affine import grouped, ungrouped
from planish.ir.errors import (
    NonFiniteWeight,
    ScaleOverflow,
    UnknownFormat,
    UnsupportedGroupSize,
    UnsupportedShape,
    WrongOption,
)
from planish.ir.formats import AffineInt, Encoded, known_formats, parse_format
from planish.ir.grid import Grid
from planish.ir.numerics import (
    cosine,
    kl_divergence,
    max_abs_error,
    perplexity,
    relative_error,
    sqnr,
)
from torch import Tensor

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = st.sampled_from(
    [(1, 7), (5, 3), (3, 70), (2, 5, 33), (4, 96), (37, 2), (9,), (2, 1, 3, 8)]
)


def seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def formats(draw: st.DrawFn, **fixed: object) -> AffineInt:
    options: dict[str, object] = {
        "bits": draw(st.integers(2, 8)),
        "group_size": draw(st.sampled_from([None, 1, 2, 3, 16, 32, 50])),
        "symmetric": draw(st.booleans()),
        "scale_dtype": draw(st.sampled_from([None, *FLOATS])),
    }
    options |= fixed
    if options["symmetric"]:
        options["code_range"] = draw(st.sampled_from(["narrow", "full"]))
    return AffineInt(**options)  # type: ignore[arg-type]


@st.composite
def weights(draw: st.DrawFn, low: int = -50, high: int = 14) -> Tensor:
    """Gaussian, skewed, sparse or outlier weights of a size 2^low to 2^high, in any dtype."""
    weight = seeded(draw(st.integers(0, 10**6)), *draw(SHAPES))
    kind = draw(st.sampled_from(["gauss", "positive", "offset", "sparse", "outlier"]))
    if kind == "positive":
        weight = weight.abs()
    elif kind == "offset":
        weight = weight + 5
    elif kind == "sparse":
        weight = weight * (weight.abs() > 1)
    elif kind == "outlier":
        weight.view(-1)[0] = 1000.0
    size = draw(st.integers(low, high))
    limited = (weight * 2.0**size).clamp(-60000, 60000)
    return limited.to(draw(st.sampled_from(FLOATS)))


def axis_for(weight: Tensor, last: bool) -> int:
    return -1 if last or weight.dim() < 2 else -2


@settings(max_examples=300, deadline=None)
@given(formats(), weights(), st.booleans())
def test_the_error_is_within_the_declared_worst(fmt: AffineInt, weight: Tensor, last: bool) -> None:
    encoded = fmt.encode(weight, axis_for(weight, last))
    decoded = encoded.decode()
    assert decoded.shape == weight.shape
    assert decoded.dtype == weight.dtype
    assert decoded.is_contiguous()
    error = (weight.double() - decoded.double()).abs()
    bound = encoded.worst_error()
    assert bound.shape == weight.shape
    assert bool((error <= bound).all()), f"{fmt.name}: {(error - bound).max():g} beyond"
    assert bool((encoded.codes().int() < 1 << fmt.bits).all())


@given(st.integers(2, 8), st.booleans(), st.sampled_from(FLOATS))
def test_the_worst_error_is_about_half_a_step(
    bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    """The bound must not be true by being slack: inside the grid it is half a step."""
    fmt = AffineInt(bits, 16, symmetric, torch.float32)
    encoded = fmt.encode(seeded(bits, 6, 48).to(dtype))
    codes, step = encoded.codes(), encoded.scale.abs().repeat_interleave(16, dim=1).double()
    inside = (codes > 1) & (codes < (1 << bits) - 1)
    rounding = torch.finfo(dtype).eps * 2 ** (bits - 1)
    assert bool((encoded.worst_error() <= step * (0.5001 + rounding))[inside].all())
    assert bool((encoded.worst_error() <= step * (1.0001 + rounding)).all())


@settings(max_examples=200, deadline=None)
@given(formats(symmetric=True), weights(-8, 8))
def test_encoding_a_symmetric_decoded_weight_changes_nothing(
    fmt: AffineInt, weight: Tensor
) -> None:
    """Not so where a scale is subnormal: its few bits can turn over when it is derived again."""
    encoded = fmt.encode(weight)
    scale, once = encoded.scale, encoded.decode()
    assume(bool(((scale == 0) | (scale.abs() >= torch.finfo(scale.dtype).smallest_normal)).all()))
    assert torch.equal(fmt.encode(once).decode(), once)


@settings(max_examples=200, deadline=None)
@given(formats(), weights(-8, 8))
def test_encoding_on_the_same_grid_changes_nothing(fmt: AffineInt, weight: Tensor) -> None:
    encoded = fmt.encode(weight)
    again = fmt.encode_with(encoded.decode(), encoded.scale, encoded.zero_point)
    assert torch.equal(again.decode(), encoded.decode())


@settings(max_examples=200, deadline=None)
@given(formats(), weights(-8, 8), st.booleans())
def test_nearest_is_what_encoding_rounds_to(fmt: AffineInt, weight: Tensor, last: bool) -> None:
    """Group by group or at once, `nearest` and `encode_on` agree with `encode`."""
    axis = axis_for(weight, last)
    rows = weight.movedim(axis, -1).reshape(-1, weight.shape[axis])
    size = fmt.grouping(rows.shape[1])
    groups = grouped(rows.float(), size)
    count = groups.shape[1]
    parts = [fmt.grid(groups[:, g : g + 1], dtype=weight.dtype) for g in range(count)]
    grid = Grid.join(parts)
    nearest = ungrouped(grid.nearest(groups), rows.shape[1])
    own = fmt.encode(weight, axis)
    assert torch.equal(nearest.to(weight.dtype), own.decode().movedim(axis, -1).reshape(rows.shape))
    placed = nearest.reshape(weight.movedim(axis, -1).shape).movedim(-1, axis)
    assert fmt.encode_on(placed, grid, axis) == own
    one = grid.of_groups(slice(0, 1)).nearest(groups[:, :1])
    assert torch.equal(one, grid.nearest(groups)[:, :1])


@settings(max_examples=50, deadline=None)
@given(formats(scale_dtype=torch.float32), st.integers(0, 99))
def test_a_grid_by_importance_is_no_worse(fmt: AffineInt, seed: int) -> None:
    groups, importance = seeded(seed, 5, 3, 24), seeded(seed + 1, 3, 24).square()
    plain, chosen = fmt.grid(groups), fmt.grid(groups, importance)
    error = [((g.nearest(groups) - groups) ** 2 * importance).sum(-1) for g in (plain, chosen)]
    assert bool((error[1] <= error[0] * 1.00001).all())


@given(formats(), SHAPES, st.sampled_from(FLOATS), st.booleans())
def test_bits_are_known_without_encoding(
    fmt: AffineInt, sizes: tuple[int, ...], dtype: torch.dtype, last: bool
) -> None:
    axis = -1 if last or len(sizes) < 2 else -2
    encoded = fmt.encode(torch.ones(sizes, dtype=dtype), axis)
    assert fmt.bits_per_weight(sizes, axis, dtype) == encoded.bits_per_weight()


@given(formats(), st.sampled_from([0.0, 3.0, -0.375, 2.0**-14]), st.sampled_from(FLOATS))
def test_constant_groups_are_exact(fmt: AffineInt, value: float, dtype: torch.dtype) -> None:
    weight = torch.full((3, 70), value, dtype=dtype)
    encoded = fmt.encode(weight)
    assert torch.equal(encoded.decode(), weight)
    assert value != 0 or not encoded.worst_error().any()


@given(formats(), weights())
@settings(deadline=None)
def test_zero_is_always_exact(fmt: AffineInt, weight: Tensor) -> None:
    weight.view(-1)[::2] = 0
    assert not fmt.encode(weight).decode()[weight == 0].any()


@given(formats(), st.booleans())
@settings(deadline=None)
def test_rows_are_encoded_alone(fmt: AffineInt, contiguous: bool) -> None:
    """Expert weights and transposed weights hold what each of their matrices would."""
    weight = seeded(0, 3, 40, 5)
    whole = fmt.encode(
        weight if contiguous else weight.transpose(0, 1).contiguous().transpose(0, 1), -2
    )
    assert whole.rows_shape == (3, 5, 40)
    assert whole.codes().shape == (3, 5, 40)
    alone = [fmt.encode(matrix.t().contiguous()) for matrix in weight]
    assert torch.equal(whole.decode(), torch.stack([e.decode().t() for e in alone]))
    assert torch.equal(whole.scale, torch.stack([e.scale for e in alone]))


def test_blocks_of_rows_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = seeded(1, 50, 33)
    fmt = parse_format("int5-g10-asym")
    whole = fmt.encode(weight)
    monkeypatch.setattr("planish.ir.weight_blocks.CHUNK", 100)
    assert fmt.encode(weight) == whole
    assert fmt.encode(weight.t().contiguous(), axis=0).codes().equal(whole.codes())
    assert torch.equal(whole.decode(), fmt.encode(weight).decode())


# Golden values


def test_golden_full_range() -> None:
    """The value of largest magnitude takes code 0, so its sign is in the scale."""
    weight = torch.tensor([[0.5, -1.0, 8.0, 3.5, 1.0, -4.0]])
    encoded = AffineInt(4, 4).encode(weight)
    assert encoded.scale.tolist() == [[-1.0, 0.5]]
    assert encoded.codes().tolist() == [[8, 9, 0, 4, 10, 0]]
    assert encoded.decode().tolist() == [[0.0, -1.0, 8.0, 4.0, 1.0, -4.0]]
    assert encoded.parts["codes"].tolist() == [[0x98, 0x40, 0x0A]]
    assert repr(encoded) == "Encoded(int4-g4-sym, float32[1, 6], 14.67 bits a weight)"
    assert encoded.nbytes() == 3 + 2 * 4


def test_golden_narrow_range() -> None:
    encoded = AffineInt(8).encode(torch.tensor([[0.5, -12.7, 6.35, 0.0]]))
    torch.testing.assert_close(encoded.scale, torch.tensor([[0.1]]))
    assert encoded.codes().tolist() == [[133, 1, 191 + 1, 128]]


def test_golden_zero_points() -> None:
    encoded = AffineInt(2, None, symmetric=False).encode(torch.tensor([[-1.0, 2.0, 0.4, 0.0]]))
    assert encoded.scale.tolist() == [[1.0]]
    assert encoded.zero_point is not None
    assert encoded.zero_point.tolist() == [[1]]
    assert encoded.codes().tolist() == [[0, 3, 1, 1]]
    assert set(encoded.parts) == {"codes", "scale", "zero_point"}


def test_ties_go_to_even() -> None:
    encoded = AffineInt(8).encode(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5]]))
    assert encoded.decode().tolist() == [[127.0, 0.0, 2.0, 2.0, 0.0]]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_the_full_range_loses_less_below_8_bits(bits: int) -> None:
    weight = seeded(bits, 64, 320)
    full, narrow = (AffineInt(bits, 32, code_range=kind) for kind in ("full", "narrow"))
    assert AffineInt(bits, 32) == full
    gain = sqnr(weight, full.encode(weight).decode()) - sqnr(weight, narrow.encode(weight).decode())
    assert gain > 0.2


def test_equality_is_of_parts() -> None:
    weight = seeded(0, 4, 10)
    first, second = AffineInt(4, 4).encode(weight), AffineInt(4, 4).encode(weight)
    assert first == second
    parts = dict(second.parts) | {"scale": second.scale * 2}
    assert first != Encoded(second.format, second.shape, second.dtype, second.axis, parts)
    assert first != AffineInt(4, 5).encode(weight)
    assert first.axis == AffineInt(4, 4).encode(weight, axis=1).axis


# Extremes


@pytest.mark.parametrize("name", ["int4-g3-sym", "int8-channel-asym", "int2-g4-sym-narrow"])
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-38, 1e38, 3.4e38])
def test_the_ends_of_float32(name: str, size: float) -> None:
    weight = torch.tensor([[1.0, -1.0, 0.7, -0.2, 0.0], [0.3, 0.1, 1.0, 0.0, 0.9]]) * size
    encoded = parse_format(name).encode(weight)
    decoded = encoded.decode()
    assert bool(torch.isfinite(decoded).all())
    assert bool(((weight.double() - decoded.double()).abs() <= encoded.worst_error()).all())


def test_a_scale_that_would_vanish_keeps_its_group() -> None:
    encoded = AffineInt(4, None, scale_dtype=torch.float16).encode(torch.tensor([[1e-7, -4e-8]]))
    assert encoded.scale.abs().item() == 2.0**-24
    assert encoded.decode().tolist() == [[2.0**-23, -(2.0**-24)]]


def test_a_scale_that_overflows_is_refused() -> None:
    weight = torch.tensor([[1e6, -3e6]])
    with pytest.raises(ScaleOverflow, match=r"(?s)layers\.0\.w.*65504.*float32"):
        AffineInt(4, scale_dtype=torch.float16).encode(weight, where="layers.0.w")
    assert sqnr(weight, AffineInt(4).encode(weight).decode()) > 20


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_non_finite_weights_are_refused(bad: float, dtype: torch.dtype) -> None:
    weight = seeded(0, 5, 33).to(dtype)
    weight[3, 32] = bad
    with pytest.raises(
        NonFiniteWeight, match=r"(?s)layers\.3\.w.*found: -?(nan|inf) at position 32 of"
    ):
        AffineInt(4, 32).encode(weight, where="layers.3.w")


# Names


@given(formats())
def test_names_are_invertible(fmt: AffineInt) -> None:
    assert parse_format(fmt.name) == fmt


def test_names_are_canonical() -> None:
    assert AffineInt(4, 64).name == "int4-g64-sym"
    assert AffineInt(8, None, symmetric=False, scale_dtype=torch.float32).name == (
        "int8-channel-asym-f32"
    )
    assert AffineInt(8, 32, code_range="full", scale_dtype=torch.bfloat16).name == (
        "int8-g32-sym-full-bf16"
    )
    assert [parse_format(name).name for name in known_formats()] == known_formats()


@pytest.mark.parametrize(
    "name", ["int4-g64", "int9-g64-sym", "int4-g0-sym", "int4-g64-asym-narrow", "fp5", ""]
)
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(UnknownFormat, match="known: 2:4, 4:8, binary-channel"):
        parse_format(name)


def test_the_nearest_name_is_offered() -> None:
    with pytest.raises(UnknownFormat, match=r"did you mean .*int4-g64-sym"):
        parse_format("int4-g64-symm")


def test_wrong_options_are_refused() -> None:
    with pytest.raises(WrongOption, match="2 to 8"):
        AffineInt(1)
    with pytest.raises(UnsupportedGroupSize, match="positive"):
        AffineInt(4, 0)
    with pytest.raises(WrongOption, match="floating-point"):
        AffineInt(4, scale_dtype=torch.int8)
    with pytest.raises(WrongOption, match="narrow"):
        AffineInt(4, symmetric=False, code_range="narrow")


@pytest.mark.parametrize(
    "weight", [torch.ones(2, 3, dtype=torch.int32), torch.ones(0, 4), torch.tensor(1.0)]
)
def test_what_is_no_weight_is_refused(weight: Tensor) -> None:
    with pytest.raises(UnsupportedShape, match="leave this weight dense"):
        AffineInt(4).encode(weight)


# Measures


def test_measures() -> None:
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5])
    assert max_abs_error(a, b) == 0.5
    assert relative_error(a, b) == pytest.approx(0.1)
    assert sqnr(a, b) == pytest.approx(20.0)
    assert sqnr(a, a) == math.inf
    assert sqnr(a * 0, b) == -math.inf
    assert cosine(a, 2 * a) == pytest.approx(1.0)
    assert cosine(a, a * 0) == 0.0
    with pytest.raises(ValueError, match="shapes differ"):
        sqnr(a, a.unsqueeze(0))


def test_measures_of_logits() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    expected = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert kl_divergence(p.log().expand(2, 3), q.log().expand(2, 3) + 7) == pytest.approx(expected)
    assert kl_divergence(p.log(), p.log()) == 0
    masked = torch.tensor([0.5, 0.5, 0.0]).log()
    assert kl_divergence(masked, p.log()) == pytest.approx(0.5 * math.log(2))
    logits = torch.stack([p.log(), q.log(), p.log()]).unsqueeze(0)
    ids = torch.tensor([[1, 0, 2]])  # position 0 predicts 0 (p = 1/2), position 1 predicts 2 (1/2)
    assert perplexity(logits, ids) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="do not fit"):
        perplexity(logits, ids[:, :2])
