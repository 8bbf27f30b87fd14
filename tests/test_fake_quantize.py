"""Quantization-aware training: gradients pass, training helps, and export is what it saw."""

from __future__ import annotations

import pytest
import torch
from coded_model import IDS, coded
from planish.ir.encoded import Encoded
from planish.ir.formats import parse_format
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.passes.fake_quantize import FakeQuantized, fake_quantize
from planish.passes.pipeline import Pipeline
from planish.passes.quantize_activations import QuantizeActivations
from planish.passes.quantize_weights import QuantizeWeights
from torch import Tensor
from torch.nn.functional import kl_div

FORMATS = ["int2-g8-sym", "int3-channel-asym", "int4-g32-offset", "ternary-channel",
           "binary-channel", "nf4-g16", "fp8-e4m3-tensor", "mxfp4", "kmeans2-channel"]  # fmt: skip


@pytest.fixture(scope="module")
def program() -> Program:
    return coded()


@pytest.mark.parametrize("name", FORMATS)
def test_the_gradient_is_straight_through(name: str) -> None:
    fmt = parse_format(name)
    weight = torch.randn(7, 24, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rounded = fake_quantize(weight, fmt)
    assert torch.equal(rounded, fmt.encode(weight.detach()).decode())
    told = torch.randn(7, 24)
    rounded.backward(told)
    assert weight.grad is not None
    assert torch.equal(weight.grad, told)


@pytest.mark.parametrize("name", FORMATS)
def test_export_computes_what_training_saw(program: Program, name: str) -> None:
    module = FakeQuantized(program, QuantizeWeights(format=name, remainder="short"), "*.bias")
    train(module, program, 2)
    exported = module.quantized()
    with torch.no_grad():
        assert torch.equal(module(IDS), exported(IDS))
    names = [n for n in exported.weights if isinstance(exported.weights.entry(n), Encoded)]
    assert sorted(names) == ["head.weight", "mix", "up.weight"]
    again = Pipeline([module.quantizer], verify="structure").run(module.trained())
    assert torch.equal(run(again, [IDS])[0], run(exported, [IDS])[0])


def test_gradients_reach_every_trained_weight(program: Program) -> None:
    module = FakeQuantized(program, QuantizeWeights(bits=3, group_size=8), "*.bias, table.*")
    assert set(module.trained_weights()) == {"up.weight", "mix", "head.weight", "up.bias",
                                             "table.weight"}  # fmt: skip
    module(IDS).square().mean().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def train(module: FakeQuantized, teacher: Program, steps: int, rate: float = 1e-3) -> list[float]:
    """Distil a program's own outputs into its quantized form; the losses."""
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(0)
    losses: list[float] = []
    for _ in range(steps):
        ids = torch.randint(0, 101, (8, 16), generator=generator)
        loss = divergence(module(ids), teacher(ids))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """KL of the float model's next-token distributions to the quantized model's."""
    wanted = (4 * theirs).detach().log_softmax(-1).flatten(0, -2)
    return kl_div((4 * ours).log_softmax(-1).flatten(0, -2), wanted, None, None, "batchmean", True)


@pytest.mark.parametrize("name", ["int2-g8-sym", "int3-channel-sym", "ternary-channel",
                                  "binary-g8"])  # fmt: skip
def test_training_beats_rounding_afterwards(program: Program, name: str) -> None:
    quantizer = QuantizeWeights(format=name)
    module = FakeQuantized(program, quantizer)
    after = Pipeline([quantizer], verify="structure").run(program)
    before_training = float(divergence(after(IDS), program(IDS)))
    train(module, program, 80)
    trained = float(divergence(module.quantized()(IDS), program(IDS)))
    assert trained < 0.6 * before_training


def test_activations_pass_gradients_too(program: Program) -> None:
    """By token int8: the exported program rounds them as the training forward pass did."""
    rounding = QuantizeActivations(only="all")
    rounded = Pipeline([rounding], verify="structure").run(program)
    module = FakeQuantized(rounded, QuantizeWeights(bits=8), "table.weight")
    module(IDS).square().mean().backward()
    table = module.get_parameter("table__weight")
    assert table.grad is not None
    assert table.grad.abs().sum() > 0
    with torch.no_grad():
        assert torch.equal(module(IDS), module.quantized()(IDS))
        plain = FakeQuantized(program, QuantizeWeights(bits=8))
        assert not torch.equal(module(IDS), plain(IDS))


def test_half_precision_weights_are_trained_in_float32() -> None:
    program = coded(dtype=torch.bfloat16)
    module = FakeQuantized(program, QuantizeWeights(bits=4, group_size=8))
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    train(module, program, 2)
    exported = module.quantized()
    assert exported.weights.dtype("up.weight") == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(module(IDS), exported(IDS))
