"""order_columns: golden text, its refusals, and act-order checkpoints that run and fuse packed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from planish.codegen.target import export_program
from planish.ir.capture import capture_module
from planish.ir.encoded import Encoded
from planish.ir.errors import UnsupportedByTarget
from planish.ir.format_ordered import Ordered
from planish.ir.formats import AffineInt, parse_format
from planish.ir.program import Program
from planish.ir.text import program_text
from planish.passes.catalog import find_pass
from planish.passes.order_columns import OrderColumns
from planish.passes.pipeline import Pipeline
from tiny_checkpoints import dense_llama, encoded_weights
from torch import Tensor, nn


def ordered(weight: Tensor, axis: int = -1, seed: int = 0) -> Encoded:
    """Groups of columns that lie apart, as act-order picks them."""
    made = torch.Generator().manual_seed(seed)
    order = torch.randperm(weight.shape[axis], generator=made)
    inner = parse_format("int4-g8-asym")
    assert isinstance(inner, AffineInt)
    plain = inner.encode(weight.index_select(axis, order), axis)
    parts = {**plain.parts, "order": order.to(torch.int32)}
    return Encoded(Ordered(inner), plain.shape, plain.dtype, plain.axis, parts)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 8, bias=False)
        self.side = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x)) + self.side(x).sum(-1, keepdim=True)


def _two() -> Program:
    torch.manual_seed(0)
    program = capture_module(Two(), (torch.randn(3, 16),))
    for name in ("up.weight", "down.weight", "side.weight"):
        program.weights[name] = ordered(program.weights[name])
    return program


def test_an_ordered_weight_is_the_plain_one_with_its_columns_put_back() -> None:
    weight = torch.randn(6, 16)
    entry = ordered(weight)
    fmt = entry.format
    assert isinstance(fmt, Ordered) and parse_format(fmt.name) == fmt
    order = entry.parts["order"].long()
    assert torch.equal(entry.decode()[:, order], fmt.plain(entry).decode())
    assert torch.equal(entry.codes()[:, order], fmt.plain(entry).codes())
    assert bool(((weight - entry.decode()).abs() <= entry.worst_error()).all())
    turned = ordered(weight.t().contiguous(), -2)
    assert torch.equal(turned.decode().t(), entry.decode())


def test_before_and_after() -> None:
    before = _two()
    after = Pipeline([OrderColumns()], verify="numbers", on_break="raise").run(before)
    lines = program_text(after).splitlines()
    assert lines[1:5] == [
        "%up.index_select = index_select(%x, -1, %up.weight.order) : f32[n0, 16]",
        "%up.linear = linear(%up.index_select, %up.weight, %up.bias) : f32[n0, 24]",
        "%down.index_select = index_select(%up.linear, -1, %down.weight.order) : f32[n0, 24]",
        "%down.linear = linear(%down.index_select, %down.weight) : f32[n0, 8]",
    ]
    assert sum("index_select(" in line for line in lines) == 2  # up and side share theirs
    for name, entry in encoded_weights(after).items():
        assert entry.format == parse_format("int4-g8-asym"), name


def test_a_weight_that_is_read_otherwise_is_left_alone() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 24, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.layer.weight.sum()

    program = capture_module(Read(), (torch.randn(3, 16),))
    program.weights["layer.weight"] = ordered(program.weights["layer.weight"])
    after = Pipeline([OrderColumns()]).run(program)
    (declined,) = after.history.records[-1].declined
    assert declined.reason == "%sum_1 reads it too, and is no product"
    assert isinstance(encoded_weights(after)["layer.weight"].format, Ordered)


@pytest.mark.parametrize("same", [True, False])
def test_projections_of_one_order_are_fused(same: bool, tmp_path: Path) -> None:
    program = dense_llama()
    names = [n for n in program.weights if n.endswith("proj.weight")]
    for seed, name in enumerate(names):
        program.weights[name] = ordered(program.weights[name], seed=0 if same else seed)
    steps = ["canonicalize", "raise_norm", "raise_rotary", "raise_gate", "raise_attention"]
    passes = [find_pass(name)() for name in [*steps, "order_columns", "fuse_qkv", "fuse_gate_up"]]
    line = Pipeline(passes, verify="numbers", on_break="raise")
    after = line.run(program, probes=[list(program.examples)])
    assert sum("+" in name for name in after.weights) == (4 if same else 0)
    with pytest.raises(UnsupportedByTarget, match=r"the program reads .*\.order"):
        export_program(after, tmp_path / "out", "gptq")
