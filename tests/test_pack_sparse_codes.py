"""2:4 weights in few bits, stored in half: what lies where, the same values, every target's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from coded_model import IDS, coded
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_checks import assert_equal_to_rounding, exported
from planish.codegen.checkpoint_layers import affine_layer
from planish.codegen.gguf_blocks import gguf_block
from planish.codegen.kernel_call import KernelCall
from planish.codegen.lower_cpu import lower_for_cpu
from planish.codegen.lower_triton import lower_for_triton
from planish.ir.encoded import Encoded
from planish.ir.errors import WrongOption
from planish.ir.format_two_four import PLACES, Compressed
from planish.ir.format_two_four_codes import CODES, CompressedCodes, with_zeros
from planish.ir.formats import AffineInt, parse_format
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.ir.program_folder import load_program, save_program
from planish.ir.text import program_text
from planish.passes.pack_sparse import PackSparse
from planish.passes.pipeline import Pipeline
from planish.passes.prune_magnitude import PruneMagnitude
from planish.passes.quantize_gptq import QuantizeGptq
from planish.passes.quantize_weights import QuantizeWeights

WEIGHTS = ("up.weight", "mix", "head.weight")


def quantized(pattern: str = "2:4", **options: object) -> Program:
    settings = {"bits": 4, "group_size": 16, "remainder": "short", **options}
    steps = [PruneMagnitude(sparsity=pattern, heads=True), QuantizeWeights(**settings)]  # type: ignore[arg-type]
    return Pipeline(steps).run(coded(72))


def packed(pattern: str = "2:4", **options: object) -> Program:
    return Pipeline([PackSparse()], verify="numbers").run(quantized(pattern, **options))


def same(found: Encoded, wanted: Encoded) -> bool:
    return found.parts.keys() == wanted.parts.keys() and all(
        torch.equal(part, wanted.parts[name]) for name, part in found.parts.items()
    )


def test_what_lies_where() -> None:
    base = AffineInt(4, 4)
    weight = torch.tensor([[0.0, 5, 0, -8, 0, 0, 4, 0, -8, 1]])
    encoded = CompressedCodes(base).encode(weight)
    # of 8 for zero; columns 1 and 3, then 0 (the first zero) and 2, then 0 and 1
    kept = [8 + 5, 8 - 8, 8, 0, 0, 8 + 1]
    assert encoded.scale.tolist() == [[1, -0.5, 1]]
    assert encoded.parts[CODES].tolist() == [
        [kept[0] + 16 * kept[1], kept[2] + 16 * kept[3], kept[4] + 16 * kept[5]]
    ]
    assert encoded.parts[PLACES].tolist() == [[(1 + 4 * 3) + 16 * (0 + 4 * 2), 0 + 4 * 1]]
    assert torch.equal(encoded.decode(), weight)
    assert torch.equal(encoded.codes(), base.encode(weight).codes())


@st.composite
def bases(draw: st.DrawFn) -> AffineInt:
    return AffineInt(
        draw(st.integers(3, 8)),
        draw(st.sampled_from([None, 1, 2, 3, 16])),
        draw(st.booleans()),
        draw(st.sampled_from([None, torch.float16])),
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[CompressedCodes, torch.Tensor, int]:
    """A format, a weight of any values (zeros and subnormals too), and the grouped axis."""
    keep, of = draw(st.sampled_from([(2, 4), (4, 8)]))
    fmt = CompressedCodes(draw(bases()), keep, of)
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    random = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    weight = torch.randn(rows, width, generator=random)
    weight = weight * draw(st.sampled_from([1.0, 100.0, 2.0**-140]))
    weight = weight * (torch.rand(rows, width, generator=random) < draw(st.floats(0, 1)))
    turned = draw(st.booleans())
    return fmt, weight.t().contiguous() if turned else weight, -2 if turned else -1


@settings(max_examples=200, deadline=None)
@given(cases())
def test_codes_with_the_pattern_are_kept_bit_for_bit(
    case: tuple[CompressedCodes, torch.Tensor, int],
) -> None:
    fmt, weight, axis = case
    weight = Compressed(fmt.keep, fmt.of).encode(weight, axis).decode()
    base = fmt.base.encode(weight, axis)
    assert fmt.holds(base)
    half = fmt.compressed(base)
    assert same(with_zeros(half), base) and half.shape == base.shape
    assert torch.equal(half.decode(), base.decode())
    stored = fmt.stored(weight.shape, axis, weight.dtype)
    assert stored == {name: (p.dtype, tuple(p.shape)) for name, p in half.parts.items()}


@settings(max_examples=200, deadline=None)
@given(cases())
def test_of_another_weight_the_largest_stay_and_the_error_is_declared(
    case: tuple[CompressedCodes, torch.Tensor, int],
) -> None:
    fmt, weight, axis = case
    encoded = fmt.encode(weight, axis)
    assert bool(
        ((weight.double() - encoded.decode().double()).abs() <= encoded.worst_error()).all()
    )
    assert fmt.holds(with_zeros(encoded))
    dense = fmt.base.encode(weight, axis)
    if not fmt.holds(dense):
        assert not same(with_zeros(fmt.compressed(dense)), dense)


def test_bits_per_weight() -> None:
    half, whole = (parse_format(f"int4-g64-sym-f16{x}") for x in ("+2:4", ""))
    assert half.bits_per_weight((3, 64)) == 2 + 1 + 16 / 64
    assert whole.bits_per_weight((3, 64)) == 4 + 16 / 64
    assert parse_format("int8-channel-sym+4:8").bits_per_weight((3, 64)) == 4 + 1 + 32 / 64
    with pytest.raises(WrongOption, match="no smaller"):
        CompressedCodes(AffineInt(2))


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"bits": 8}, {"bits": 3}])
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_the_pass_is_exact_and_saves_what_it_says(pattern: str, options: dict[str, object]) -> None:
    before, after = quantized(pattern, **options), packed(pattern, **options)
    assert program_text(before) == program_text(after)
    notes = {a.after: a.note for a in after.history.records[-1].applied}
    for name in WEIGHTS:
        old, new = before.weights.entry(name), after.weights.entry(name)
        assert isinstance(old, Encoded) and isinstance(new, Encoded)
        assert new.format == CompressedCodes(old.format, *map(int, pattern.split(":")))  # type: ignore[arg-type]
        assert torch.equal(new.decode(), old.decode()) and same(with_zeros(new), old)
        saved = old.format.bits / 2 - 1  # type: ignore[attr-defined]
        assert old.bits_per_weight() - new.bits_per_weight() == pytest.approx(saved, abs=0.25)
        assert notes[name] == f"{new.format.name}: {new.bits_per_weight():.3g} bits a weight"
    assert torch.equal(run(before, [IDS])[0], run(after, [IDS])[0])


def test_what_is_not_packed_is_told() -> None:
    dense = Pipeline([QuantizeWeights(bits=4), PackSparse()]).run(coded(96))
    reasons = {d.value: d.reason for d in dense.history.records[-1].declined}
    assert reasons["up.weight"].startswith("the zeros among its codes of int4")
    assert reasons["up.weight"].endswith("are not two in every four along its summed axis")
    few = Pipeline([PackSparse()]).run(quantized(bits=2)).history.records[-1]
    assert {d.reason for d in few.declined} == {
        "its codes of 2 bits are no smaller beside their places"
    }
    again = Pipeline([PackSparse()]).run(packed()).history.records[-1]
    assert {d.reason for d in again.declined} == {"it is stored as int4-g16-sym-f32+2:4 already"}


def test_a_folder_keeps_the_half(tmp_path: Path) -> None:
    program = packed()
    save_program(program, tmp_path / "saved")
    loaded = load_program(tmp_path / "saved")
    for name in WEIGHTS:
        old, new = program.weights.entry(name), loaded.weights.entry(name)
        assert isinstance(old, Encoded) and isinstance(new, Encoded)
        assert old.format == new.format and same(old, new)


def test_gptq_keeps_the_zeros() -> None:
    steps = [PruneMagnitude(sparsity="2:4", heads=True), QuantizeGptq(bits=4, group_size=8)]
    program = Pipeline([*steps, PackSparse()]).run(coded(72), calibration=[[IDS]])
    assert {program.weights.entry(n).format.name for n in WEIGHTS} == {"int4-g8-sym-f32+2:4"}  # type: ignore[union-attr]


def test_targets_read_the_base_s_codes(tmp_path: Path) -> None:
    before, after = quantized(), packed()
    for lower in (lower_for_cpu, lower_for_triton):
        both = [lower(program) for program in (before, after)]
        texts = [program_text(b[0] if isinstance(b, tuple) else b.program) for b in both]
        assert texts[0] == texts[1]
    kernels = [
        node.target.spec.name
        for node in lower_for_triton(after).program.graph.nodes
        if isinstance(node.target, KernelCall)
    ]
    assert kernels.count("linear_int") == 3
    told = "+2:4 as int4-g16-sym-f32, zeros put back, because no kernel reads codes in half"
    assert len([s for s in lower_for_triton(after).sentences if told in s]) == 3
    _, sentences = lower_for_cpu(after)
    assert len([s for s in sentences if "with the zeros put back" in s]) == 3
    folder = exported(after, tmp_path / "half")
    assert_equal_to_rounding(after, folder, [IDS])


def test_checkpoints_hold_the_base_s_codes() -> None:
    fmt = parse_format("int4-g32-sym-f16")
    assert isinstance(fmt, AffineInt)
    random = torch.Generator().manual_seed(0)
    half = CompressedCodes(fmt).encode(torch.randn(20, 64, generator=random))
    whole = with_zeros(half)
    layer = affine_layer("up", half)
    assert layer is not None and layer.affine == fmt and same(layer.entry, whole)
    blocks = [gguf_block("up", entry) for entry in (half, whole)]
    assert blocks[0].layout == blocks[1].layout and same(blocks[0].entry, blocks[1].entry)
