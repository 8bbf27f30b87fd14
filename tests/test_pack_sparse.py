"""2:4 weights stored in half: what lies where, the same values, and what each target does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from coded_model import IDS, coded
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_checks import assert_equal_to_rounding, exported
from planish.codegen.kernel_call import KernelCall
from planish.codegen.lower_cpu import lower_for_cpu
from planish.codegen.lower_gpu import lower_for_gpu
from planish.codegen.lower_triton import lower_for_triton
from planish.ir.encoded import Encoded
from planish.ir.errors import NonFiniteWeight
from planish.ir.format_two_four import PLACES, VALUES, Compressed
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.ir.text import program_text
from planish.passes.pack_sparse import PackSparse
from planish.passes.pipeline import Pipeline
from planish.passes.prune_magnitude import PruneMagnitude
from torch._subclasses.fake_tensor import FakeTensorMode

FORMATS = {"2:4": Compressed(2, 4), "4:8": Compressed(4, 8)}
WEIGHTS = {"up.weight": -1, "mix": -2, "head.weight": -1}


def pruned(pattern: str, width: int = 72, dtype: torch.dtype = torch.float32) -> Program:
    return Pipeline([PruneMagnitude(sparsity=pattern, heads=True)]).run(coded(width, dtype))


def packed(pattern: str, width: int = 72, dtype: torch.dtype = torch.float32) -> Program:
    return Pipeline([PackSparse()], verify="numbers").run(pruned(pattern, width, dtype))


def test_what_lies_where() -> None:
    weight = torch.tensor([[0.0, 5, 0, 7, 0, 0, 3, 0, 2, 1]])
    encoded = Compressed(2, 4).encode(weight)
    assert encoded.parts[VALUES].tolist() == [[5, 7, 0, 3, 2, 1]]
    # columns 1 and 3; 0 and 2 (of equal zeros the first); 0 and 1: a nibble each, lowest first
    assert encoded.parts[PLACES].tolist() == [[(1 + 4 * 3) + 16 * (0 + 4 * 2), 0 + 4 * 1]]
    assert torch.equal(encoded.decode(), weight)
    eight = torch.tensor([[0.0, 5, 0, 7, 0, 0, 3, 1]])
    encoded = Compressed(4, 8).encode(eight)
    assert encoded.parts[VALUES].tolist() == [[5, 7, 3, 1]]
    assert encoded.parts[PLACES].tolist() == [[2 + 8 + 64 + 128]]
    assert torch.equal(encoded.decode(), eight)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_a_weight_with_the_pattern_is_kept_bit_for_bit(data: st.DataObject) -> None:
    fmt = data.draw(st.sampled_from(list(FORMATS.values())))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.float16]))
    rows, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    # Subnormals and the largest numbers are values like any other; zeros may be among the kept.
    number = torch.finfo(dtype)
    some = [0.0, 1.0, -3.5, number.smallest_normal / 4, number.max, number.min]
    count = rows * width
    drawn = data.draw(st.lists(st.sampled_from(some), min_size=count, max_size=count))
    weight = torch.tensor(drawn, dtype=dtype).view(rows, width)
    order = torch.rand(
        rows, -(-width // fmt.of), fmt.of, generator=torch.Generator().manual_seed(1)
    )
    kept = (order.argsort(-1) < fmt.keep).flatten(1)[:, :width]
    weight = torch.where(kept, weight, 0)
    turned = data.draw(st.booleans())
    given_, axis = (weight.t().contiguous(), -2) if turned else (weight, -1)
    encoded = fmt.encode(given_, axis)
    assert torch.equal(encoded.decode(), given_)
    exact = encoded.worst_error()
    assert bool((exact[kept.t() if turned else kept] <= 0).all() | (weight[kept] == 0).any())


def test_of_another_weight_the_largest_stay_and_the_error_is_declared() -> None:
    weight = torch.tensor([[1.0, -4, 2, 3, 5, 5, 5, 5]])
    encoded = Compressed(2, 4).encode(weight)
    assert encoded.decode().tolist() == [[0, -4, 0, 3, 5, 5, 0, 0]]
    assert encoded.worst_error().tolist() == [[3, 0, 3, 0, 0, 0, 5, 5]]
    with pytest.raises(NonFiniteWeight):
        Compressed(2, 4).encode(torch.full((1, 4), float("inf")))


def test_bits_per_weight() -> None:
    assert Compressed(2, 4).bits_per_weight((3, 64), dtype=torch.float16) == 8 + 1
    assert Compressed(4, 8).bits_per_weight((3, 64), dtype=torch.float16) == 8 + 1
    assert Compressed(2, 4).bits_per_weight((3, 64)) == 16 + 1


@pytest.mark.parametrize("pattern", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pass_is_exact_and_halves_the_bytes(pattern: str, dtype: torch.dtype) -> None:
    before = pruned(pattern, dtype=dtype)
    after = Pipeline([PackSparse()], verify="numbers").run(before)
    assert program_text(before) == program_text(after)
    assert "dense_weights" not in after.facts
    for name, axis in WEIGHTS.items():
        entry = after.weights.entry(name)
        assert isinstance(entry, Encoded)
        assert (entry.format, entry.axis, entry.dtype) == (FORMATS[pattern], axis, dtype)
        assert torch.equal(entry.decode(), before.weights[name])
        assert entry.bits_per_weight() == pytest.approx(8 * dtype.itemsize / 2 + 1, rel=0.05)
    assert torch.equal(run(before, [IDS])[0], run(after, [IDS])[0])


def test_what_is_not_packed_is_told() -> None:
    dense = Pipeline([PackSparse()]).run(coded()).history.records[-1]
    reasons = {d.value: d.reason for d in dense.declined}
    assert reasons["up.weight"] == "0.0% zeros, but not two in every four along its summed axis"
    program = pruned("2:4")
    weight = program.weights["up.weight"].clone()
    weight[weight == 0] = -0.0
    program.weights["up.weight"] = weight
    program.weights["head.weight"] = program.weights["head.weight"] * float("inf")
    record = Pipeline([PackSparse()], verify="structure").run(program).history.records[-1]
    reasons = {d.value: d.reason for d in record.declined}
    assert reasons["up.weight"] == "it holds negative zeros, which would become positive"
    assert reasons["head.weight"] == "it holds infinities or NaNs"
    again = Pipeline([PackSparse(), PackSparse()]).run(pruned("2:4")).history.records[-1]
    assert {d.reason for d in again.declined} == {"it is stored as 2:4 already"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_triton_target_multiplies_by_what_is_stored(dtype: torch.dtype) -> None:
    program = packed("2:4", 96, dtype)
    lowering = lower_for_triton(program)
    used = [
        node.target.spec.name
        for node in lowering.program.graph.nodes
        if isinstance(node.target, KernelCall)
    ]
    assert used.count("linear_sparse24") == 3
    kept = lowering.program.weights
    assert not set(WEIGHTS) & set(kept)
    stored = sum(kept[name].nbytes for name in kept if "sparse24" in name)
    dense = sum(program.weights[name].nbytes for name in WEIGHTS)
    # Rows are filled up to 256 columns: here of 96, 40 and 96.
    assert stored < dense * 256 / 40
    told = [s for s in lower_for_triton(packed("4:8", 96)).sentences if "reads 4:8" in s]
    assert len(told) == 3


def test_the_kernel_computes_the_product() -> None:
    program = packed("2:4", 96)
    relu = next(node for node in program.graph.nodes if "relu" in str(node.target))
    with FakeTensorMode():  # only its device is looked at; the numbers stay on the CPU
        relu.meta["val"] = torch.empty(relu.meta["val"].shape, device="cuda")
    lowered, _ = lower_for_gpu(program, "sm_90")
    targets = [str(node.target) for node in lowered.graph.nodes]
    assert targets.count("planish.linear_sparse24.default") == 3
    (got,), (own,) = run(lowered, [IDS]), run(program, [IDS])
    (exact,) = run(program, [IDS], float64=True)
    allowed = 4 * (own.double() - exact).abs().max() + 2**-22 * exact.abs().max()
    assert (got.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("pattern", FORMATS)
def test_onnx_stores_the_half(pattern: str, tmp_path: Path) -> None:
    folder = exported(packed(pattern, 520), tmp_path / "half")
    assert_equal_to_rounding(packed(pattern, 520), folder, [IDS])
    whole = exported(pruned(pattern, 520), tmp_path / "whole")

    def size(place: Path) -> int:
        return sum(f.stat().st_size for f in place.rglob("*") if f.is_file())

    saved = sum(coded(520).weights[name].nbytes for name in WEIGHTS) * 15 / 32
    # The graph that spreads them out takes some of it: at most four tables [256, 8] and its nodes.
    assert size(whole) - size(folder) > saved - 4 * 2048 - 12_000


def test_the_cpu_target_decodes_and_says_so() -> None:
    program = packed("2:4")
    lowered, sentences = lower_for_cpu(program)
    told = "(2:4) stays dense because no kernel multiplies by a compressed weight here"
    assert len([s for s in sentences if told in s]) == 3
    assert torch.equal(run(lowered, [IDS])[0], run(program, [IDS])[0])
