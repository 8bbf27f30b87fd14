"""Packed layouts: pack and unpack are inverse, and the kernels that read them agree."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from planish.ir.errors import UnsupportedGroupSize, UnsupportedShape, WrongOption
from planish.ir.layouts import (
    BitPacked,
    MatMulNBitsLayout,
    TorchInt4Layout,
    TorchInt8Layout,
    spread,
    widen,
)
from torch import Tensor


def random_codes(seed: int, bits: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)


def random_floats(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def within_rounding(found: Tensor, x: Tensor, weight: Tensor, terms: int) -> bool:
    """Is `found` x @ weight.T up to float32 sums of `terms` terms and one rounding to its dtype?"""
    exact = x.double() @ weight.double().T
    sizes = x.double().abs() @ weight.double().abs().T
    bound = sizes * (terms + 8) * 2.0**-24 + exact.abs() * torch.finfo(found.dtype).eps
    return bool(((found.double() - exact).abs() <= bound).all())


# BitPacked


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (1, [1, 0, 1, 1, 0, 0, 0, 0, 1], [0b00001101, 0b1]),
        (2, [1, 2, 3, 0, 3], [0b00_11_10_01, 0b11]),
        (3, [1, 2, 3, 4, 5, 6, 7, 0, 7], [0b11_010_001, 0b1_101_100_0, 0b000_111_11, 0b111]),
        (4, [1, 2, 15], [0x21, 0x0F]),
        (8, [200, 7], [200, 7]),
    ],
)
def test_bits_lie_from_the_lowest_up(bits: int, codes: list[int], packed: list[int]) -> None:
    found = BitPacked(bits).pack(torch.tensor(codes, dtype=torch.uint8))
    expected = sum(code << (bits * i) for i, code in enumerate(codes))
    assert int.from_bytes(bytes(found.tolist()), "little") == expected
    if bits != 3:
        assert found.tolist() == packed


@given(st.integers(1, 8), st.integers(1, 70), st.integers(1, 5), st.integers(0, 9))
def test_bit_packing_is_invertible_and_dense(bits: int, length: int, rows: int, seed: int) -> None:
    layout, codes = BitPacked(bits), random_codes(seed, bits, 2, rows, length)
    packed = layout.pack(codes)
    assert packed.shape == (2, rows, -(-length * bits // 8))
    row = int.from_bytes(bytes(packed[1, -1].tolist()), "little")
    assert row == sum(code << (bits * i) for i, code in enumerate(codes[1, -1].tolist()))
    assert torch.equal(layout.unpack(packed, length), codes)


def test_bit_packing_takes_transposed_codes() -> None:
    codes = random_codes(0, 3, 11, 5).t()
    assert torch.equal(BitPacked(3).unpack(BitPacked(3).pack(codes), 11), codes)


def test_a_width_beyond_a_byte_is_refused() -> None:
    with pytest.raises(WrongOption, match="1 to 8"):
        BitPacked(9)


@pytest.mark.parametrize(("bits", "to_bits"), [(2, 4), (3, 4), (5, 8), (7, 8), (4, 4)])
def test_widening_keeps_the_distance_to_the_middle(bits: int, to_bits: int) -> None:
    codes = torch.arange(1 << bits, dtype=torch.uint8)
    wide = widen(codes, bits, to_bits)
    assert wide.dtype == torch.uint8
    assert torch.equal(wide.int() - (1 << (to_bits - 1)), codes.int() - (1 << (bits - 1)))


def test_scales_are_repeated_for_smaller_blocks() -> None:
    scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert spread(scales, 64, 32, 100).tolist() == [[1, 1, 2, 2], [3, 3, 4, 4]]
    assert spread(scales, 64, 32, 96).tolist() == [[1, 1, 2], [3, 3, 4]]
    assert spread(scales[:, :1], None, 32, 40).tolist() == [[1, 1], [3, 3]]
    with pytest.raises(UnsupportedGroupSize, match="multiple of 32"):
        spread(scales, 48, 32, 96)


# MatMulNBits


def run_matmul_nbits(
    layout: MatMulNBitsLayout, x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None
) -> Tensor:
    rows, length = codes.shape
    tensors = {"b": layout.pack(codes), "scales": scale}
    if zero is not None:
        tensors["zeros"] = layout.pack_zero_points(zero)
    node = helper.make_node(
        "MatMulNBits", ["x", *tensors], ["y"], domain="com.microsoft",
        K=length, N=rows, bits=layout.bits, block_size=layout.block_size,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", length])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", rows])],
        [numpy_helper.from_array(t.numpy(), name) for name, t in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(np.asarray(session.run(None, {"x": x.numpy()})[0]))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("with_zeros", [False, True])
def test_onnxruntime_reads_our_layout(bits: int, block_size: int, with_zeros: bool) -> None:
    rows, length = 13, 2 * block_size + 7
    layout, codes = MatMulNBitsLayout(bits, block_size), random_codes(bits, bits, rows, length)
    scale = random_floats(1, rows, layout.blocks(length))
    zero = random_codes(2, bits, rows, layout.blocks(length)) if with_zeros else None
    offset = (1 << (bits - 1)) if zero is None else spread(zero, block_size, 1, length).float()
    weight = (codes.float() - offset) * spread(scale, block_size, 1, length)
    x = random_floats(3, 3, length)
    assert within_rounding(run_matmul_nbits(layout, x, codes, scale, zero), x, weight, length)


@given(
    st.sampled_from([2, 4, 8]), st.sampled_from([16, 32, 64]), st.integers(1, 9), st.integers(1, 99)
)
def test_matmul_nbits_is_invertible(bits: int, block_size: int, rows: int, length: int) -> None:
    layout = MatMulNBitsLayout(bits, block_size)
    codes = random_codes(length, bits, rows, length)
    zeros = random_codes(rows, bits, rows, layout.blocks(length))
    stored = layout.pack(codes)
    assert stored.shape == (rows, layout.blocks(length), block_size * bits // 8)
    assert torch.equal(layout.unpack(stored, length), codes)
    assert torch.equal(layout.unpack_zero_points(layout.pack_zero_points(zeros), length), zeros)


@pytest.mark.parametrize(
    ("bits", "group_size", "length", "expected"),
    [
        (4, 64, 576, (4, 64)),
        (3, 512, 576, (4, 256)),
        (8, None, 576, (8, 64)),
        (2, None, 71, (2, 32)),
        (5, 48, 96, (8, 16)),
        (4, 100, 60, (4, 32)),
    ],
)
def test_a_layout_is_found_for_a_format(
    bits: int, group_size: int | None, length: int, expected: tuple[int, int]
) -> None:
    assert MatMulNBitsLayout.serving(bits, group_size, length) == MatMulNBitsLayout(*expected)


def test_what_onnxruntime_does_not_run_is_refused() -> None:
    with pytest.raises(WrongOption, match="widen the codes"):
        MatMulNBitsLayout(3, 32)
    with pytest.raises(UnsupportedGroupSize, match="16, 32, 64, 128 or 256"):
        MatMulNBitsLayout(4, 48)


# torch's CPU kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "length", "tokens"), [(48, 64, 1), (33, 80, 5), (7, 96, 3)])
def test_torch_int8_kernel_reads_our_layout(
    dtype: torch.dtype, rows: int, length: int, tokens: int
) -> None:
    layout, codes = TorchInt8Layout(), random_codes(rows, 8, rows, length)
    assert layout.runs(length, dtype)
    scale, x = random_floats(1, rows).to(dtype), random_floats(2, tokens, length).to(dtype)
    weight = (codes.double() - 128) * scale.double().unsqueeze(-1)
    found = torch._weight_int8pack_mm(x, layout.pack(codes), scale)
    assert within_rounding(found, x, weight, length)


@given(st.integers(2, 8), st.integers(1, 9), st.integers(1, 40))
def test_torch_int8_is_invertible(bits: int, rows: int, length: int) -> None:
    layout, codes = TorchInt8Layout(bits), random_codes(length, bits, rows, length)
    assert torch.equal(layout.pack(codes).int(), codes.int() - (1 << (bits - 1)))
    assert torch.equal(layout.unpack(layout.pack(codes)), codes)


@given(
    st.integers(1, 200), st.sampled_from([32, 64, 128, 256]), st.integers(1, 3), st.integers(0, 9)
)
@settings(deadline=None)
def test_torch_int4_is_invertible(rows: int, group_size: int, groups: int, seed: int) -> None:
    layout, codes = TorchInt4Layout(group_size), random_codes(seed, 4, rows, groups * group_size)
    packed = layout.pack(codes)
    assert packed.shape == (rows + -rows % 16, groups * group_size // 2)
    assert torch.equal(layout.unpack(packed, rows), codes)
    scale, zero = random_floats(seed, rows, groups), random_codes(seed, 4, rows, groups)
    found, found_zero = layout.unpack_scales(layout.pack_scales(scale, zero, torch.float32), rows)
    assert torch.equal(found, scale)
    assert torch.equal(found_zero, zero)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [64, 80, 33])
@pytest.mark.parametrize("with_zeros", [False, True])
def test_torch_int4_kernel_reads_our_layout(
    dtype: torch.dtype, rows: int, with_zeros: bool
) -> None:
    layout, length = TorchInt4Layout(32), 96
    codes, scale = random_codes(1, 4, rows, length), random_floats(2, rows, 3).to(dtype)
    zero = random_codes(3, 4, rows, 3) if with_zeros else None
    x = random_floats(4, 5, length).to(dtype)
    scales = layout.pack_scales(scale, zero, dtype)
    found = torch.ops.aten._weight_int4pack_mm_for_cpu(x, layout.pack(codes), 32, scales)
    grid = scales.double().transpose(0, 1)[:rows].repeat_interleave(32, dim=1)
    weight = (codes.double() - 8) * grid[..., 0] + grid[..., 1]
    # The kernel rounds each dequantized weight to the dtype of x before it multiplies.
    exact, sizes = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    bound = (torch.finfo(dtype).eps + length * 2.0**-23) * sizes
    assert bool(((found[:, :rows].double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("capability", ["avx512", "avx2", "default"])
def test_torch_int4_unpacks_on_every_kind_of_processor(capability: str) -> None:
    """torch reads the capability once, at its start; one the machine lacks falls back."""
    script = (
        "import torch; from planish.ir.layouts import TorchInt4Layout as L\n"
        "for rows in (16, 80, 150):\n"
        "    c = torch.randint(0, 16, (rows, 64), dtype=torch.uint8)\n"
        "    p = L(32).pack(c); s = L(32).pack_scales(torch.ones(rows, 2), None, torch.float32)\n"
        "    y = torch.ops.aten._weight_int4pack_mm_for_cpu(torch.eye(64), p, 32, s)[:, :rows]\n"
        "    assert torch.equal(y.t() + 8, c.float()) and torch.equal(L(32).unpack(p, rows), c)\n"
        "print('same', torch.backends.cpu.get_cpu_capability())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("same"), done.stderr


def test_what_torch_does_not_run_is_refused() -> None:
    with pytest.raises(UnsupportedGroupSize, match="32, 64, 128 or 256"):
        TorchInt4Layout(48)
    with pytest.raises(UnsupportedShape, match="multiple of 64"):
        TorchInt4Layout(64).pack(random_codes(0, 4, 32, 96))
    assert not TorchInt8Layout().runs(33, torch.bfloat16)
    assert TorchInt8Layout().runs(33, torch.float32)
