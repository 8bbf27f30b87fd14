"""Tiny GGUF files with blocks of every kind, random but finite."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from planish.ir.layout_gguf import LAYOUTS
from torch import Tensor

HIDDEN, HEADS, KEY_HEADS, WIDTH, INNER, VOCABULARY = 256, 4, 2, 48, 512, 101
# the type of each matrix of a block; the output projection's width is no multiple of 256
KINDS = {
    "attn_q": 2,
    "attn_k": 3,
    "attn_v": 12,
    "attn_output": 8,
    "ffn_gate": 14,
    "ffn_up": 13,
    "ffn_down": 6,
}
_SHAPES = {
    "attn_q": (HEADS * WIDTH, HIDDEN),
    "attn_k": (KEY_HEADS * WIDTH, HIDDEN),
    "attn_v": (KEY_HEADS * WIDTH, HIDDEN),
    "attn_output": (HIDDEN, HEADS * WIDTH),
    "ffn_gate": (INNER, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
}


def float16_places(name: str, nbytes: int) -> list[int]:
    """Where the float16 numbers of a block lie."""
    if name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K"):
        return [0, 2]
    if name == "Q2_K":
        return [nbytes - 4, nbytes - 2]
    return [nbytes - 2] if name in ("Q3_K", "Q6_K") else [0]


def random_blocks(kind: int, rows: int, blocks: int, size: float = 1.0) -> Tensor:
    """uint8 [rows, blocks * nbytes] whose float16 numbers are about `size`, of either sign."""
    layout, made = LAYOUTS[kind], torch.Generator().manual_seed(kind)
    shape = (rows, blocks, layout.nbytes)
    stored = torch.randint(0, 256, shape, dtype=torch.uint8, generator=made)
    for at in float16_places(layout.name, layout.nbytes):
        half = (size * torch.randn(rows, blocks, 1, generator=made)).to(torch.float16)
        stored[..., at : at + 2] = half.view(torch.uint8)
    return stored.flatten(1)


def write_tiny_gguf(file: Path, kinds: dict[str, int] | None = None) -> Path:
    """A llama of one layer; its embeddings are Q8_0 and it has no head of its own."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_key_length(WIDTH)
    writer.add_value_length(WIDTH)
    writer.add_rope_dimension_count(WIDTH)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(0)
    _add(writer, "token_embd.weight", 8, (VOCABULARY, HIDDEN))
    for name, kind in {**KINDS, **(kinds or {})}.items():
        _add(writer, f"blk.0.{name}.weight", kind, _SHAPES[name])
    norm = torch.rand(3, HIDDEN, generator=torch.Generator().manual_seed(1)).numpy()
    for row, name in enumerate(("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")):
        writer.add_tensor(f"{name}.weight", norm[row])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add(writer: gguf.GGUFWriter, name: str, kind: int, shape: tuple[int, int]) -> None:
    blocks = random_blocks(kind, shape[0], shape[1] // LAYOUTS[kind].length, 0.002)
    writer.add_tensor(name, blocks.numpy(), raw_dtype=gguf.GGMLQuantizationType(kind))
