"""Attention for ONNX: heads beside one another, and rotary tables that are proven."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import captured
import pytest
import torch
from onnx_checks import assert_equal_to_rounding, exported, op_counts
from planish.api import optimize
from planish.codegen.onnx_positions import Lengths, RotaryTables
from planish.codegen.onnx_sizes import size
from planish.ir.capture import capture_module
from planish.ir.program import Node, Program
from torch import Tensor, nn


@pytest.mark.parametrize("profile", ["ort", "standard"])
@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_heads_are_never_moved(name: str, profile: str, tmp_path: Path) -> None:
    sample = captured.sample(name, "sdpa")
    program = optimize(captured.captured(name), recipe="exact").program
    folder = exported(program, tmp_path / "out", profile=profile)
    counts = op_counts(folder)
    moved = 1 if name == "vit" else 0  # the patches of an image
    assert (counts["Attention"], counts["Softmax"]) == (2, 0)
    assert counts["Transpose"] == moved
    flat = program.flatten_inputs((), sample.other_inputs())
    assert_equal_to_rounding(program, folder, flat)


@pytest.mark.parametrize(("name", "wanted"), [("vit", 2), ("gpt2", 2), ("bert", 0), ("llama", 0)])
def test_multi_head_attention_on_demand(name: str, wanted: int, tmp_path: Path) -> None:
    """Not where a boolean mask may blind a query (bert), nor for grouped heads (llama)."""
    sample = captured.sample(name, "sdpa")
    if name == "gpt2":
        ids = {"input_ids": sample.kwargs["input_ids"]}
        program = optimize(capture_module(sample.model, (), ids), recipe="exact").program
        flat: list[Any] = [torch.randint(3, 97, (3, 11))]
    else:
        program = optimize(captured.captured(name), recipe="exact").program
        flat = program.flatten_inputs((), sample.other_inputs())
    folder = exported(program, tmp_path / "out", options={"attention": "mha"})
    counts = op_counts(folder)
    assert (counts["MultiHeadAttention"], counts["Attention"]) == (wanted, 2 - wanted)
    assert_equal_to_rounding(program, folder, flat)


class _Angles(nn.Module):
    """Angles of places counted from `past`, of one kind or another."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("frequencies", 10000.0 ** (-torch.arange(8) / 8))

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        length, before = x.shape[1], past.shape[2]
        places = (torch.arange(length) + before).float()
        if self.kind == "stretched":
            places = places / (length + before)
        if self.kind == "data":
            places = places + x[0, 0, 0]
        angles = (places[:, None] * self.frequencies).cos()
        return angles[None] * x[:, :, :8]


def _angles(kind: str) -> tuple[Program, Node, Lengths]:
    free: Any = torch.export.Dim.DYNAMIC
    program = capture_module(
        _Angles(kind),
        (torch.randn(2, 5, 8), torch.randn(2, 3, 4, 8)),
        dynamic_shapes={"x": {1: free}, "past": {2: free}},
    )
    x, past = program.inputs
    node = next(n for n in program.graph.nodes if "cos" in str(n.target))
    unsqueezed = next((u for u in node.users if "unsqueeze" in str(u.target)), node)
    lengths = Lengths(size(x.meta["val"].shape[1]), size(past.meta["val"].shape[2]))
    return program, unsqueezed, lengths


def test_a_row_of_a_rotary_table_is_the_angle_of_its_place() -> None:
    program, node, lengths = _angles("plain")
    table = RotaryTables(program, lengths, 40).table(node)
    assert isinstance(table, Tensor)
    frequencies = 10000.0 ** (-torch.arange(8) / 8)
    assert torch.equal(table, (torch.arange(40.0)[:, None] * frequencies).cos())


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("stretched", "of a place depend on the text's length too"),
        ("data", "depend on more than places"),
    ],
)
def test_angles_of_more_than_places_have_no_table(kind: str, sentence: str) -> None:
    program, node, lengths = _angles(kind)
    found = RotaryTables(program, lengths, 40).table(node)
    assert isinstance(found, str) and found.endswith(sentence)
