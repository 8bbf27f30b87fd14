"""The packed layouts of checkpoints: invertible, and equal to what the formats' authors compute."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.ir.formats import parse_format
from planish.ir.layout_awq import AwqLayout
from planish.ir.layout_bitnet import BitnetLayout
from planish.ir.layout_gguf import LAYOUTS, Blocks
from planish.ir.layout_gptq import GptqLayout
from planish.ir.layout_words import WordPacked
from planish.ir.read_gguf_codes import encoded_blocks
from tiny_gguf import random_blocks
from torch import Tensor
from transformers.integrations.bitnet import pack_weights

_SEEDS = st.integers(0, 2**32 - 1)


def _codes(bits: int, *shape: int, seed: int = 0) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=made)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.booleans(), st.integers(1, 5), st.integers(1, 99), _SEEDS)
def test_words_are_unpacked_as_they_were_packed(
    bits: int, spaced: bool, rows: int, length: int, seed: int
) -> None:
    codes, layout = _codes(bits, rows, length, seed=seed), WordPacked(bits, spaced)
    stored = layout.pack(codes)
    assert stored.dtype == torch.int32 and stored.shape == (rows, layout.words(length))
    assert torch.equal(layout.unpack(stored, length), codes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("spaced", [False, True])
def test_a_word_holds_its_codes_from_the_lowest_bit_on(bits: int, spaced: bool) -> None:
    """Against whole numbers of any length, in plain Python."""
    codes = _codes(bits, 1, 41)
    per = 32 // bits
    number = 0
    for place, code in enumerate(codes[0].tolist()):
        at = 32 * (place // per) + bits * (place % per) if spaced else bits * place
        number |= code << at
    words = WordPacked(bits, spaced).pack(codes)[0]
    expected = number.to_bytes(4 * len(words), "little")
    assert words.numpy().astype("<i4").tobytes() == expected


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([1, 2]),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 5),
    _SEEDS,
)
def test_gptq_tensors_are_unpacked_as_they_were_packed(
    bits: int, version: int, outs: int, ins: int, groups: int, seed: int
) -> None:
    layout, rows, length = GptqLayout(bits, version), 32 * outs, 32 * ins
    codes, zeros = _codes(bits, rows, length, seed=seed), _codes(bits, rows, groups, seed=seed)
    stored, stored_zeros = layout.pack(codes), layout.pack_zero_points(zeros)
    assert stored.shape == (length * bits // 32, rows)
    assert stored_zeros.shape == (groups, rows * bits // 32)
    assert torch.equal(layout.unpack(stored), codes)
    assert torch.equal(layout.unpack_zero_points(stored_zeros, rows), zeros)


def test_gptq_version_one_stores_zero_points_less_one() -> None:
    zeros = torch.tensor([[8], [1], [0], [15], [8], [8], [8], [8]], dtype=torch.uint8)
    assert GptqLayout(4, 1).pack_zero_points(zeros)[0, 0].item() & 0xFFFF == 0xEF07
    assert GptqLayout(4, 2).pack_zero_points(zeros)[0, 0].item() & 0xFFFF == 0xF018


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 9), _SEEDS)
def test_awq_tensors_are_unpacked_as_they_were_packed(outs: int, ins: int, seed: int) -> None:
    codes = _codes(4, 8 * outs, ins, seed=seed)
    stored = AwqLayout().pack(codes)
    assert stored.shape == (ins, outs)
    assert torch.equal(AwqLayout().unpack(stored), codes)


def test_awq_puts_even_outputs_before_odd_ones() -> None:
    codes = torch.arange(8, dtype=torch.uint8).reshape(8, 1)
    assert AwqLayout().pack(codes).item() == 0x75316420


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 9), _SEEDS)
def test_bitnet_rows_are_unpacked_as_they_were_packed(outs: int, ins: int, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 3, (4 * outs, ins), dtype=torch.uint8, generator=made)
    stored = BitnetLayout().pack(codes)
    assert torch.equal(stored, pack_weights(codes.to(torch.int8) - 1))
    assert torch.equal(BitnetLayout().unpack(stored), codes)


def _values(blocks: Blocks) -> Tensor:
    """float32 [rows, length]."""
    codes = blocks.codes.float().unflatten(-1, (-1, blocks.group_size))
    scale = blocks.scale.float().unsqueeze(-1)
    if blocks.offset is None:
        return ((codes - (1 << (blocks.bits - 1))) * scale).flatten(1)
    return (codes * scale + blocks.offset.float().unsqueeze(-1)).flatten(1)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_gguf_blocks_decode_as_ggml_decodes_them(kind: int) -> None:
    layout = LAYOUTS[kind]
    stored = random_blocks(kind, 5, 3)
    theirs = gguf.dequantize(stored.numpy(), gguf.GGMLQuantizationType(kind))
    assert (layout.length, layout.nbytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    assert layout.name == gguf.GGMLQuantizationType(kind).name
    blocks = layout.unpack(stored)
    assert np.array_equal(_values(blocks).numpy(), theirs)
    encoded = encoded_blocks(blocks, torch.float32)
    assert np.array_equal(encoded.decode().numpy(), theirs)
    assert parse_format(encoded.format.name) == encoded.format
    kept = encoded.format.stored(encoded.shape, -1, torch.float32)
    found = {name: (part.dtype, tuple(part.shape)) for name, part in encoded.parts.items()}
    assert kept == found


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([2, 3, 8]), st.integers(1, 4), st.integers(1, 4), _SEEDS)
def test_gguf_blocks_are_unpacked_as_they_were_packed(
    kind: int, rows: int, blocks: int, seed: int
) -> None:
    layout, made = LAYOUTS[kind], torch.Generator().manual_seed(seed)
    codes = _codes(8 if kind == 8 else 4, rows, 32 * blocks, seed=seed)
    scale = torch.randn(rows, blocks, generator=made).to(torch.float16)
    offset = scale.flip(0) if kind == 3 else None
    stored = layout.pack(codes, scale, offset)
    assert stored.shape == (rows, blocks * layout.nbytes)
    back = layout.unpack(stored)
    assert torch.equal(back.codes, codes) and torch.equal(back.scale, scale)
    assert back.offset is None if offset is None else torch.equal(back.offset, offset)
