"""fuse_qkv and fuse_gate_up: golden texts, near misses, and numbers against float64."""

from __future__ import annotations

import planish.ir.ops
import torch
from planish.ir.capture import capture_module
from planish.ir.encoded import Encoded
from planish.ir.formats import AffineInt
from planish.ir.program import Program
from planish.ir.text import program_text
from planish.passes.fuse_gate_up import FuseGateUp
from planish.passes.fuse_qkv import FuseQkv
from planish.passes.pipeline import Pipeline
from torch import Tensor, nn

assert planish.ir.ops


class GatedMlp(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 10, bias=False)
        self.up = nn.Linear(6, 10, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.planish.gated(self.gate(x), self.up(x), "silu")


class Attention(nn.Module):
    """Grouped queries: 4 query heads of 3, 2 key-value heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(10, 12), nn.Linear(10, 6), nn.Linear(10, 6)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 3)).transpose(1, 2)
        k = self.k(memory).unflatten(-1, (2, 3)).transpose(1, 2)
        v = self.v(memory).unflatten(-1, (2, 3)).transpose(1, 2)
        return torch.ops.planish.attention(q, k, v, scale=0.5)


class SelfAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x)


def raised(model: nn.Module, *shapes: tuple[int, ...]) -> Program:
    torch.manual_seed(0)
    program = capture_module(model, tuple(torch.randn(shape) for shape in shapes))
    program.facts |= {"raised", "raised_gates", "raised_attention"}
    return program


def run(step: FuseQkv | FuseGateUp, program: Program) -> Program:
    return Pipeline([step], verify="numbers", on_break="raise").run(program)


def test_gate_and_up_become_one_matmul_and_a_missing_bias_is_zero() -> None:
    after = run(FuseGateUp(), raised(GatedMlp(), (2, 3, 6)))
    assert program_text(after, weights=True) == (
        "%x : f32[n0, 3, 6]\n"
        "%gate+up.weight = weight : f32[20, 6]\n"
        "%gate+up.bias = weight : f32[20]\n"
        "%linear = linear(%x, %gate+up.weight, %gate+up.bias) : f32[n0, 3, 20]\n"
        "%gate = slice(%linear, -1, 0, 10) : f32[n0, 3, 10]\n"
        "%up = slice(%linear, -1, 10, 20) : f32[n0, 3, 10]\n"
        "%gated = gated(%gate, %up, 'silu') : f32[n0, 3, 10]\n"
        "return [%gated]"
    )
    assert torch.equal(after.weights["gate+up.bias"][:10], torch.zeros(10))
    assert "gate.weight" not in after.weights
    assert len(after.history.records[-1].applied) == 2


def test_self_attention_becomes_one_matmul() -> None:
    after = run(FuseQkv(), raised(SelfAttention(), (2, 5, 10)))
    linears = [n for n in after.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert [tuple(after.weights.shape(str(n.args[1].target))) for n in linears] == [(24, 10)]
    assert list(after.weights) == ["q+k+v.weight", "q+k+v.bias"]


def test_in_cross_attention_keys_and_values_become_one() -> None:
    after = run(FuseQkv(), raised(Attention(), (2, 5, 10), (2, 7, 10)))
    assert set(after.weights) == {"q.weight", "q.bias", "k+v.weight", "k+v.bias"}


def decline(step: FuseQkv | FuseGateUp, program: Program) -> str:
    after = Pipeline([step]).run(program)
    (found,) = after.history.records[-1].declined
    assert not after.history.records[-1].applied
    return found.reason


class Packed(SelfAttention):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(10, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split((12, 6, 6), -1)
        heads = [t.unflatten(-1, (-1, 3)).transpose(1, 2) for t in (q, k, v)]
        return torch.ops.planish.attention(*heads, scale=0.5)


class Computed(GatedMlp):
    def forward(self, x: Tensor) -> Tensor:
        up = nn.functional.linear(x, self.up.weight * 2)
        return torch.ops.planish.gated(self.gate(x), up, "silu")


class Different(GatedMlp):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.planish.gated(self.gate(x), self.up(x + 1), "silu")


class NotAMatmul(GatedMlp):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.planish.gated(self.gate(x), self.up(x) + 1, "silu")


def test_near_misses_say_why() -> None:
    x = (2, 3, 6)
    assert decline(FuseGateUp(), raised(Computed(), x)) == (
        "the weight of %linear is computed in the graph"
    )
    assert decline(FuseGateUp(), raised(Different(), x)) == (
        "%linear_1 reads another value than %linear"
    )
    assert "not two matmuls" in decline(FuseGateUp(), raised(NotAMatmul(), x))
    packed = decline(FuseQkv(), raised(Packed(), (2, 5, 10)))
    assert packed in (
        "query, key and value are one matmul already",
        "the query does not come straight from one matmul",
    )


def test_the_stacked_weight_follows_its_sources_without_a_copy() -> None:
    model = GatedMlp()
    after = run(FuseGateUp(), raised(model, (2, 3, 6)))
    with torch.no_grad():
        model.up.weight.fill_(7.0)
    assert bool((after.weights["gate+up.weight"][10:] == 7).all())


def encoded(program: Program, formats: dict[str, AffineInt]) -> Program:
    for name, form in formats.items():
        program.weights[name] = form.encode(program.weights[name])
    return program


def test_encoded_weights_are_stacked_code_by_code() -> None:
    names = [f"{name}.weight" for name in "qkv"]
    before = raised(SelfAttention(), (2, 5, 10))
    encoded(before, dict.fromkeys(names, AffineInt(4, 5, symmetric=False)))
    after = run(FuseQkv(), before)
    stacked = after.weights.entry("q+k+v.weight")
    assert isinstance(stacked, Encoded)
    assert stacked.shape == (24, 10)
    parts = [before.weights.entry(name) for name in names]
    codes = torch.cat([part.codes() for part in parts if isinstance(part, Encoded)])
    assert torch.equal(stacked.codes(), codes)
    assert torch.equal(stacked.decode(), torch.cat([before.weights[name] for name in names]))


def test_weights_of_different_formats_stay_apart_and_the_reason_is_told() -> None:
    before = encoded(raised(GatedMlp(), (2, 3, 6)), {"gate.weight": AffineInt(4, 3)})
    after = run(FuseGateUp(), before)
    assert program_text(after) == program_text(before)
    (declined,) = after.history.records[-1].declined
    assert declined.reason == (
        "up.weight is dense and another of the weights is kept in a number format"
    )
    encoded(before, {"up.weight": AffineInt(8, 3)})
    (declined,) = run(FuseGateUp(), before).history.records[-1].declined
    assert declined.reason == "one is kept as int4-g3-sym, another as int8-g3-sym"
