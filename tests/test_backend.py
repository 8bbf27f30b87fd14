"""torch.compile(backend="planish"): equality, fresh weights, recompilations, fallbacks, options."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import zoo
from planish.backend import planish
from planish.backend_messages import FallbackWarning
from planish.ir.errors import UnknownOption, UnknownRecipe, WrongOption
from torch import Tensor, nn
from torch.utils import _pytree as pytree

EAGER: dict[str, Any] = {"recipe": "exact", "compiler": "eager"}
INT8: dict[str, Any] = {
    "recipe": "int8",
    "compiler": "eager",
    "quantize_weights.group_size": "none",
    "quantize_weights.embeddings": "none",
}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def counted(options: dict[str, Any]) -> tuple[Callable[..., Any], list[int]]:
    """The backend, and a list that gets one element for every graph it compiles."""
    calls: list[int] = []

    def backend(module: Any, inputs: Any) -> Any:
        calls.append(len(module.graph.nodes))
        return planish(module, inputs, options=options)

    return backend, calls


def tensors(result: Any) -> list[Tensor]:
    values = list(result.values()) if isinstance(result, dict) else result
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def rounding(model: nn.Module, inputs: dict[str, Any]) -> list[float]:
    """The error of the eager float32 run against float64, largest over each output.

    Rows that see no key are NaN in float64, where the lowest float32 is not low enough.
    """
    single = tensors(model(**inputs))
    wide = {
        name: value.double() if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    double = tensors(copy.deepcopy(model).double()(**wide))
    errors = [(a - b).abs() for a, b in zip(single, double, strict=True)]
    assert all(error.isfinite().any() for error in errors)
    return [float(error[error.isfinite()].max()) for error in errors]


def assert_equal_to_rounding(model: nn.Module, compiled: Any, inputs: dict[str, Any]) -> None:
    """Both runs stay within the float32 error: 8 times, as in a BOUNDED contract."""
    found, wanted = tensors(compiled(**inputs)), tensors(model(**inputs))
    bounds = rounding(model, inputs)
    assert len(found) == len(wanted) == len(bounds)
    for have, want, bound in zip(found, wanted, bounds, strict=True):
        allowed = 9 * bound + torch.finfo(torch.float32).eps
        assert float((have - want).abs().max()) <= allowed


def fallbacks(recorded: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in recorded if issubclass(w.category, FallbackWarning)]


@pytest.mark.parametrize(
    ("name", "attention", "layers"),
    [
        ("llama", "sdpa", 2),
        ("gpt2", "sdpa", 1),
        ("bert", "sdpa", 1),
        ("t5", "eager", 1),
        ("gemma2", "eager", 1),
        ("mixtral", "sdpa", 1),
        ("vit", "sdpa", 1),
    ],
)
def test_equals_the_model_and_recompiles_once(
    name: str, attention: zoo.Attention, layers: int
) -> None:
    sample = zoo.build(name, attention, layers)
    backend, calls = counted(EAGER)
    compiled = torch.compile(sample.model, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        compiled(**sample.kwargs)
        assert len(calls) == 1
        for batch, length in [(2, 13), (3, 13), (4, 17), (2, 19)]:
            assert_equal_to_rounding(sample.model, compiled, sample.other_inputs(batch, length))
    assert len(calls) == 2 or (name == "vit" and len(calls) <= 2)


def test_inductor_runs_what_the_recipe_made() -> None:
    sample = zoo.build("llama", "sdpa", layers=1)
    compiled = torch.compile(sample.model, backend="planish")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        assert_equal_to_rounding(sample.model, compiled, sample.kwargs)
        assert_equal_to_rounding(sample.model, compiled, sample.other_inputs())
    weight = next(p for p in sample.model.parameters() if p.dim() == 2)
    weight.mul_(1.5)
    assert_equal_to_rounding(sample.model, compiled, sample.other_inputs())


def _step(model: nn.Module, weight: Tensor) -> None:
    """An optimizer's step, the gradients given."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def _load(model: nn.Module, weight: Tensor, assign: bool = False) -> None:
    state = {name: value * 0.5 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)


WRITES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "optimizer": _step,
    "in place": lambda model, weight: weight.mul_(3),
    "data": lambda model, weight: weight.data.copy_(weight.data * -2),
    "data assigned": lambda model, weight: setattr(weight, "data", weight.data * -2),
    "numpy": lambda model, weight: weight.detach().numpy().__imul__(-2),
    "load_state_dict": _load,
    "load_state_dict assign": lambda model, weight: _load(model, weight, assign=True),
}


class Small(nn.Module):
    """Two layers, one bias, and a graph break on demand."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 48), nn.Linear(48, 24, bias=False)
        self.broken = broken

    def forward(self, x: Tensor, factor: int = 2) -> dict[str, Any]:
        hidden = self.first(x)
        if self.broken:
            torch._dynamo.graph_break()
        return {"y": self.second(hidden).relu() * factor, "none": None, "rows": x.shape[0]}


@pytest.mark.parametrize("write", list(WRITES))
@pytest.mark.parametrize("options", [EAGER, INT8], ids=["exact", "int8"])
def test_written_weights_are_used(options: dict[str, Any], write: str) -> None:
    torch.manual_seed(0)
    model, x = Small(), torch.randn(5, 32)
    compiled = torch.compile(model, backend="planish", options=options)
    stale = compiled(x)["y"]
    WRITES[write](model, model.first.weight)
    found, wanted = compiled(x)["y"], model(x)["y"]
    change = float((stale - wanted).norm() / wanted.norm())
    error = float((found - wanted).norm() / wanted.norm())
    assert change > 0.2
    assert error <= (1e-6 if options is EAGER else 0.02)  # 8 bits: half a step of 1/127 per value
    assert torch.equal(compiled(x)["y"], found)


def test_int8_is_not_the_dense_model() -> None:
    model, x = Small(), torch.randn(5, 32)
    found = torch.compile(model, backend="planish", options=INT8)(x)["y"]
    assert not torch.allclose(found, model(x)["y"], rtol=1e-6, atol=1e-7)


def test_int8_serves_new_shapes_after_a_write() -> None:
    model = Small()
    backend, calls = counted(INT8)
    compiled = torch.compile(model, backend=backend)
    for rows in (5, 7, 9):
        model.first.weight.mul_(1.1)
        x = torch.randn(rows, 32)
        wanted = model(x)["y"]
        assert float((compiled(x)["y"] - wanted).norm() / wanted.norm()) <= 0.02
    assert len(calls) == 2


def test_graph_breaks_and_plain_results() -> None:
    model = Small(broken=True)
    backend, calls = counted(EAGER)
    compiled = torch.compile(model, backend=backend)
    for rows, factor in [(5, 2), (5, 3), (6, 4), (7, 5)]:
        x = torch.randn(rows, 32)
        found, wanted = compiled(x, factor), model(x, factor)
        torch.testing.assert_close(found["y"], wanted["y"])
        assert found["none"] is None and found["rows"] == rows
    assert len(calls) >= 2


def test_training_falls_back_with_one_warning_and_trains() -> None:
    torch.manual_seed(0)
    model = Small(broken=True)
    compiled = torch.compile(model, backend="planish")  # Inductor's own training path
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, losses = torch.randn(64, 32), []
    with torch.enable_grad(), warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        for rows in (64, 64, 48, 64):
            loss = (compiled(x[:rows])["y"] - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
    told = fallbacks(recorded)
    assert len(told) == 1 and "gradients are enabled" in told[0] and "no_grad" in told[0]
    assert losses[-1] < losses[0]
    assert torch.allclose(compiled(x)["y"], model(x)["y"], atol=1e-6)  # and now inference


def test_training_mode_without_gradients_is_served() -> None:
    model = Small().train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        x = torch.randn(5, 32)
        found = torch.compile(model, backend="planish", options=EAGER)(x)["y"]
    torch.testing.assert_close(found, model(x)["y"])


def _written(x: Tensor) -> Tensor:
    x.add_(1)
    return x * 2


def _random(x: Tensor) -> Tensor:
    return nn.functional.dropout(x, 0.5) * 0


def _autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu"):
        return x @ x.T


def _branch(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (_written, "writes to its inputs"),
        (_random, "draws random numbers (aten.dropout"),
        (_autocast, "_enter_autocast"),
        (_branch, "not a tensor"),
    ],
)
def test_what_is_not_a_pure_function_falls_back(function: Any, sentence: str) -> None:
    x = torch.randn(3, 5)
    wanted = function(x.clone())
    compiled = torch.compile(function, backend="planish", options=EAGER)
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        found = compiled(x)
        torch.testing.assert_close(found, wanted)
        compiled(torch.randn(4, 5))
    told = fallbacks(recorded)
    assert len(told) == 1 and sentence in told[0]
    if function is _written:
        torch.testing.assert_close(x * 2, wanted)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x.view(-1), x),
        lambda x: (x * 2).add_(1).mul_(3),
        lambda x: torch.fft.ifft(torch.fft.fft(x)).real,
        lambda x: x + torch.tensor([1.0, 2, 3, 4, 5]),
        lambda x: torch.complex(x, x).abs(),
        lambda x: (None, 3, x.shape[0], x[x > 0]),
    ],
)
def test_odd_functions_are_served(function: Any) -> None:
    compiled = torch.compile(function, backend="planish", options=EAGER)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        for rows in (3, 4, 6):
            x = torch.randn(rows, 5)
            torch.testing.assert_close(compiled(x), function(x))


def test_all_sizes_free_keeps_the_models_numbers_constant() -> None:
    sample = zoo.build("llama", "sdpa", layers=1)
    backend, calls = counted(EAGER)
    compiled = torch.compile(sample.model, backend=backend, dynamic=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        assert_equal_to_rounding(sample.model, compiled, sample.kwargs)
        assert_equal_to_rounding(sample.model, compiled, sample.other_inputs())
    assert len(calls) == 1


def test_without_a_compiler_the_graph_runs_eagerly() -> None:
    from torch._inductor import config

    model, x = Small(), torch.randn(5, 32)
    without = config.patch(
        {"cpp.cxx": (None, "no-such-compiler"), "fx_graph_cache": False, "compile_threads": 1}
    )
    with without, warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        found = torch.compile(model, backend="planish")(x)["y"]
    torch.testing.assert_close(found, model(x)["y"])
    told = fallbacks(recorded)
    assert len(told) == 1 and "no working C++ compiler" in told[0]


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"recipe": "exat"}, UnknownRecipe, "did you mean exact"),
        ({"recip": "exact"}, UnknownOption, "did you mean recipe"),
        ({"compiler": "gcc"}, WrongOption, "inductor or eager"),
        ({"recipe": "exact", "canonicalise.x": 1}, UnknownOption, "did you mean canonicalize"),
        ({"recipe": "int8", "quantize_weights.bits": 9}, WrongOption, "bits"),
    ],
)
def test_mistakes_in_the_options_are_raised(
    options: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    compiled = torch.compile(Small(), backend="planish", options=options)
    with pytest.raises(error, match=sentence):
        compiled(torch.randn(5, 32))


def test_a_mode_of_inductor_is_refused() -> None:
    compiled = torch.compile(Small(), backend="planish", mode="max-autotune")
    with pytest.raises(WrongOption, match="belongs to Inductor"):
        compiled(torch.randn(5, 32))
