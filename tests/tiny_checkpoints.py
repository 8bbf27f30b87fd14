"""A tiny model for tests of checkpoints, its programs with encoded weights, and comparing them."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import planish
import torch
import transformers
from planish.ir.encoded import Encoded
from planish.ir.format_ordered import Ordered
from planish.ir.formats import AffineInt, parse_format
from planish.ir.program import Program


def tiny_llama(folder: Path, **changes: Any) -> Path:
    """A model of which no weight is square, its widths multiples of 32."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "vocab_size": 101,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        **changes,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@functools.cache
def _captured() -> Program:
    folder = Path(tempfile.mkdtemp(prefix="planish-tiny-llama-"))
    return planish.trace(tiny_llama(folder))


def dense_llama() -> Program:
    """Its captured program, a private copy; the folder is in its metadata as `origin`."""
    return _captured().copy()


def quantized(program: Program, fmt: str) -> Program:
    """Every projection in a format, with norms and embeddings as they are."""
    program = program.copy()
    for name in list(program.weights):
        if name.endswith("proj.weight"):
            program.weights[name] = parse_format(fmt).encode(program.weights[name], -1)
    return program


def encoded_weights(program: Program) -> dict[str, Encoded]:
    weights = program.weights
    found = {name: weights.entry(name) for name in weights}
    return {name: entry for name, entry in found.items() if isinstance(entry, Encoded)}


def assert_same_codes(mine: Encoded, theirs: Encoded) -> None:
    assert mine.shape == theirs.shape and mine.axis == theirs.axis
    assert torch.equal(mine.codes(), theirs.codes())
    assert mine.scale.dtype == theirs.scale.dtype and torch.equal(mine.scale, theirs.scale)
    assert torch.equal(mine.decode(), theirs.decode())
    if not isinstance(mine.format, (AffineInt, Ordered)):
        assert mine == theirs
        return
    zeros = mine.zero_point, theirs.zero_point
    assert (zeros[0] is None) == (zeros[1] is None)
    assert zeros[0] is None or torch.equal(zeros[0], zeros[1])
