"""Capture: every tiny model, in both attention forms, with free batch and length."""

from __future__ import annotations

import pytest
import torch
import zoo
from captured import fresh, sample
from planish.ir.capture import capture_module
from planish.ir.errors import CaptureFailed, StatefulModel, WrongInput
from planish.ir.interpret import run
from planish.ir.program import Program
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

FIXED_LENGTH = {"mamba"}  # a Python loop over time is unrolled by export


def tensors(value: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def assert_rounds_alike(program: Program, model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Both lie equally near to a float64 run of the program: float32 rounding is all there is."""
    with torch.no_grad():
        wanted = tensors(model(**inputs))
    flat = program.flatten_inputs((), inputs)
    have = tensors(program.unflatten_outputs(run(program, flat)))
    wide = tensors(program.unflatten_outputs(run(program, flat, float64=True)))
    assert len(wanted) == len(have) == len(wide) > 0
    for want, got, exact in zip(wanted, have, wide, strict=True):
        scale = exact.double().norm()
        eager_error = (want.double() - exact.double()).norm() / scale
        error = (got.double() - exact.double()).norm() / scale
        assert eager_error < 1e-4
        assert error <= 2 * eager_error + torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("name", "attention"), zoo.CASES)
def test_program_equals_model_at_another_shape(name: str, attention: zoo.Attention) -> None:
    made = sample(name, attention)
    inputs = made.other_inputs()
    program = fresh(name, attention)
    assert any(inputs[key].shape != value.shape for key, value in made.kwargs.items())
    assert_rounds_alike(program, made.model, inputs)
    for spec in program.input_specs:
        assert spec.shape is not None
        assert spec.shape[0] is None, "the batch is free"
        integral = spec.dtype is not None and not spec.dtype.is_floating_point
        if integral and name not in FIXED_LENGTH:
            assert spec.shape[1] is None, "the length is free"


def test_output_has_the_models_own_type() -> None:
    made = sample("llama", "sdpa")
    with torch.no_grad():
        assert type(fresh("llama", "sdpa")(**made.kwargs)) is type(made.model(**made.kwargs))


def test_weights_share_the_models_memory_and_ties_have_one_entry() -> None:
    made, program = sample("gemma", "sdpa"), fresh("gemma", "sdpa")
    state = made.model.state_dict()
    for name in program.weights:
        if name in state:
            assert program.weights[name].data_ptr() == state[name].data_ptr()
    assert program.weights.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    readers = [n for n in program.weight_nodes() if n.target == "model.embed_tokens.weight"]
    assert len(readers) == 1
    assert len(readers[0].users) >= 2


def test_every_value_knows_its_module() -> None:
    names = {name for name, _ in sample("llama", "sdpa").model.named_modules()}
    nodes = [n for n in fresh("llama", "sdpa").graph.nodes if n.op == "call_function"]
    assert all(node.meta["module"] in names for node in nodes)
    linears = [n for n in nodes if n.target is torch.ops.aten.linear.default]
    assert {n.meta["module"] for n in linears} >= {
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
        "lm_head",
    }


_FORMS: list[tuple[str, zoo.Attention]] = [
    ("bert", "sdpa"),
    ("gpt2", "eager"),
    ("bloom", "eager"),
]


def test_the_graph_is_functional_and_keeps_composites_whole() -> None:
    for name, form in _FORMS:
        program = fresh(name, form)
        for node in program.graph.nodes:
            schema = getattr(node.target, "_schema", None)
            assert schema is None or not schema.is_mutable
    targets = {n.target for n in fresh("bert", "sdpa").graph.nodes}
    aten = torch.ops.aten
    assert {aten.linear.default, aten.layer_norm.default} <= targets
    assert aten.scaled_dot_product_attention.default in targets


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + 1
        return x


def test_data_dependent_control_flow_names_the_source_line() -> None:
    with pytest.raises(CaptureFailed, match=r"Branch could not be exported") as caught:
        capture_module(Branch(), (torch.randn(2, 3),))
    assert "test_capture.py" in str(caught.value)
    assert "if x.sum() > 0" in str(caught.value)
    assert "torch.where or torch.cond" in str(caught.value)


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def test_a_model_that_writes_to_a_buffer_is_refused_by_its_name() -> None:
    with pytest.raises(StatefulModel, match="calls"):
        capture_module(Counter(), (torch.randn(2, 3),))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 6)

    def forward(self, ids: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"y": self.proj(ids) * scale}


def test_a_batch_of_one_as_example_does_not_fix_the_batch() -> None:
    model = Scaled()
    program = capture_module(model, (torch.randn(1, 4),))
    assert program.input_specs[0].shape == (None, 4)
    x = torch.randn(5, 4)
    torch.testing.assert_close(program(x)["y"], model(x)["y"])


def test_wrong_calls_are_told_what_was_captured() -> None:
    program = capture_module(Scaled(), (torch.randn(2, 4),))
    with pytest.raises(WrongInput, match=r"float32 \[\*, 4\]"):
        program(torch.randn(2, 5))
    with pytest.raises(WrongInput, match="float64"):
        program(torch.randn(2, 4).double())
    with pytest.raises(WrongInput, match="structure"):
        program(torch.randn(2, 4), torch.randn(2, 4))
    with pytest.raises(WrongInput, match="no example input"):
        capture_module(Scaled(), ())
    with pytest.raises(WrongInput, match="empty"):
        capture_module(Scaled(), (torch.zeros(0, 4),))


def test_training_mode_is_restored() -> None:
    model = Scaled().train()
    capture_module(model, (torch.randn(2, 4),))
    assert model.training


def test_a_model_that_keeps_a_cache_itself_is_captured_without() -> None:
    made = zoo.build("llama", "sdpa")
    made.model.config.use_cache = True
    ids = made.kwargs["input_ids"]
    program = capture_module(made.model, (ids,))
    assert made.model.config.use_cache is True
    assert "captured with config.use_cache off" in " ".join(program.metadata["notes"])
    with torch.no_grad():
        assert torch.equal(program(ids).logits, made.model(ids).logits)
