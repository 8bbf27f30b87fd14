"""Formats that are affine in disguise run packed on the CPU, and compute what they decode to."""

from __future__ import annotations

import pytest
import torch
from coded_model import IDS, coded, in_format
from planish.codegen.torch_cpu import compile_program, lower
from planish.ir.affine_form import affine_form, assembled
from planish.ir.encoded import Encoded
from planish.ir.format_affine import AffineInt
from planish.ir.formats import parse_format
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.kernels import native
from planish.kernels.linear_affine import SOURCE
from torch import Tensor

PLAIN = ["ternary-tensor", "ternary-g16-f16", "binary-channel", "binary-g32", "mxfp4",
         "mxfp6-e2m3", "nvfp4"]  # fmt: skip
ADDED = ["int4-g32-offset", "int3-channel-offset-f16", "int4-g16-offset-k",
         "int4-g32-sym+sparse2%", "int3-g32-asym+columns5%", "ternary-channel+sparse1%",
         "int4-g32-offset-f16+columns3%", "int4-g32-sym+sparse1%+columns4%"]  # fmt: skip
NONE = ["nf4", "fp8-e4m3-channel", "kmeans4-tensor", "gobo3", "mxfp8", "mxfp6-e3m2"]

needs_compiler = pytest.mark.skipif(
    isinstance(native.library(SOURCE), str), reason="no C compiler on this machine"
)


@pytest.fixture(scope="module")
def program() -> Program:
    return coded()


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(("shape", "axis"), [((9, 70), -1), ((70, 9), -2), ((2, 5, 33), -1)])
def test_plain_forms_are_the_same_values(name: str, shape: tuple[int, ...], axis: int) -> None:
    encoded = parse_format(name).encode(seeded(*shape), axis)
    form = affine_form(encoded)
    assert form is not None
    assert form.plain
    assert isinstance(form.steps.format, AffineInt)
    assert torch.equal(form.steps.decode(), encoded.decode())


@pytest.mark.parametrize("name", ADDED)
@pytest.mark.parametrize(("shape", "axis"), [((9, 70), -1), ((70, 9), -2)])
def test_other_forms_add_up(name: str, shape: tuple[int, ...], axis: int) -> None:
    encoded = parse_format(name).encode(seeded(*shape), axis)
    form = affine_form(encoded)
    assert form is not None
    assert not form.plain
    error = (assembled(form).double() - encoded.decode(torch.float64)).abs().max()
    assert error <= 4 * torch.finfo(torch.float32).eps * encoded.decode().abs().max()


@pytest.mark.parametrize("name", NONE)
def test_others_have_none(name: str) -> None:
    assert affine_form(parse_format(name).encode(seeded(9, 70))) is None


def assert_near(program: Program, got: Tensor) -> None:
    """As near to the float64 run as the reference is, but for another order of the sums."""
    (true,), (plain,) = run(program, [IDS], float64=True), run(program, [IDS])
    allowed = (plain - true).abs().max() + torch.finfo(plain.dtype).eps * true.abs().max()
    assert (got.shape, got.dtype) == (plain.shape, plain.dtype)
    assert (got - true).abs().max() <= 4 * allowed


@needs_compiler
@pytest.mark.parametrize("name", [*PLAIN, *ADDED])
def test_they_run_packed(program: Program, name: str) -> None:
    fmt = parse_format(name)
    table = fmt if "+" not in name else parse_format("int8-channel-sym")
    packed = in_format(program, fmt, table)
    module = lower(packed)
    told = [s for s in module.meta["choices"] if name in s]
    assert len(told) == (4 if "+" not in name else 3)
    assert all("runs packed" in s for s in told), told
    kept = sum(b.nbytes for b in module.buffers())
    assert kept < 0.45 * program.nbytes()
    assert_near(packed, compile_program(packed, "eager")(IDS)[0])


@needs_compiler
def test_other_dtypes_round_once(program: Program) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        half = coded(dtype=dtype)
        packed = in_format(half, parse_format("int4-g32-offset-f16"))
        assert_near(packed, compile_program(packed, "eager")(IDS)[0])


@needs_compiler
def test_compiled_by_inductor(program: Program) -> None:
    """One program with every kind of addition."""
    packed = in_format(program, parse_format("int4-g32-offset+sparse1%+columns4%"),
                       parse_format("int4-g32-offset"))  # fmt: skip
    run_compiled = compile_program(packed)
    assert_near(packed, run_compiled(IDS)[0])


@needs_compiler
@pytest.mark.parametrize("name", NONE)
def test_the_others_are_dense_and_say_why(program: Program, name: str) -> None:
    packed = in_format(program, parse_format(name))
    told = lower(packed).meta["choices"]
    assert told == [
        f"%{weight} ({name}) stays dense because the values of {name} lie on no grid of equal steps"
        for weight in ("mix", "table.weight", "up.weight", "head.weight")
    ]
    entry = packed.weights.entry("up.weight")
    assert isinstance(entry, Encoded)
    assert_near(packed, compile_program(packed, "eager")(IDS)[0])


@needs_compiler
def test_a_table_with_outliers_is_dense(program: Program) -> None:
    packed = in_format(program, parse_format("int4-g32-sym+sparse1%"))
    told = {s.split()[0]: s for s in lower(packed).meta["choices"]}
    assert told["%table.weight"].endswith("no kernel looks up rows with values beside the base")
    assert told["%up.weight"] == (
        "%up.weight (int4-g32-sym+sparse1%) runs packed with its outliers beside it: linear_affine"
    )
