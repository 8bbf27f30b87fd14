"""serve_adapters on branches that were captured with the model: each row has one of them."""

from __future__ import annotations

import functools
from typing import Any

import peft
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.ir.capture import capture_module
from planish.ir.errors import WrongOption
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.ir.read_lora import CannotServe
from planish.ir.text import program_text
from planish.passes.canonicalize import Canonicalize
from planish.passes.pipeline import Pipeline
from planish.passes.serve_adapters import ServeAdapters
from torch import Tensor, nn

STEP = ServeAdapters(branches=True)
NAMES = ("style", "facts")
TARGETS = {
    "llama": (["q_proj", "down_proj"], ["v_proj", "q_proj"]),
    "gpt2": (["c_attn"], ["c_attn", "mlp.c_proj"]),
    "bert": (["query"], ["query", "output.dense"]),
}


class Two(nn.Module):
    """W x + 2 B1 (A1 x) + B2 (A2 x) - S z, with W [20, 12]; what is subtracted is no branch."""

    def __init__(self, more: bool = True) -> None:
        super().__init__()
        self.more = more
        self.base, self.side = nn.Linear(12, 20), nn.Linear(9, 20, bias=False)
        self.first, self.last = nn.ModuleList(), nn.ModuleList()
        for rank in (2, 3):
            self.first.append(nn.Linear(12, rank, bias=False))
            self.last.append(nn.Linear(rank, 20, bias=False))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        y = self.base(x) + self.last[0](self.first[0](x)) * 2
        y = y + self.last[1](self.first[1](x))
        return torch.relu(y - self.side(z) if self.more else y)


def captured(model: nn.Module, *inputs: Tensor) -> Program:
    return Pipeline([Canonicalize()]).run(capture_module(model.eval(), inputs, {}))


def served(program: Program) -> Program:
    return Pipeline([STEP]).run(program)


def test_golden_text() -> None:
    torch.manual_seed(0)
    program = served(captured(Two(), torch.randn(3, 5, 12), torch.randn(3, 5, 9)))
    assert program_text(program) == (
        "%x : f32[n0, 5, 12]\n"
        "%z : f32[n0, 5, 9]\n"
        "%adapter : i32[n0]\n"
        "%base = linear(%x, %base.weight, %base.bias) : f32[n0, 5, 20]\n"
        "%adapters = adapters(%base, %x, %base.adapters_a, "
        "%base.adapters_b, %base.adapters_scale, %adapter) : f32[n0, 5, 20]\n"
        "%side = linear(%z, %side.weight) : f32[n0, 5, 20]\n"
        "%sub = sub(%adapters, %side) : f32[n0, 5, 20]\n"
        "%relu = relu(%sub) : f32[n0, 5, 20]\n"
        "return [%relu]"
    )
    notes = [a.note for a in program.history.records[-1].applied]
    assert notes == ["0 is first.0, 1 is first.1"]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(-1, 1), min_size=1, max_size=5), st.integers(0, 99))
def test_each_row_has_its_own(chosen: list[int], seed: int) -> None:
    model, program = two()
    random = torch.Generator().manual_seed(seed)
    x, z = (torch.randn(len(chosen), 4, n, generator=random, dtype=torch.float64) for n in (12, 9))
    (found,) = run(program, [x, z, torch.tensor(chosen, dtype=torch.int32)], float64=True)
    for row, number in enumerate(chosen):
        wanted = model.base(x[row]) - model.side(z[row])
        if number >= 0:
            branch = model.last[number](model.first[number](x[row]))
            wanted = wanted + branch * (2 if number == 0 else 1)
        torch.testing.assert_close(found[row], torch.relu(wanted), rtol=1e-12, atol=1e-12)


@functools.cache
def two() -> tuple[Two, Program]:
    torch.manual_seed(0)
    model = Two()
    program = served(captured(model, torch.randn(3, 5, 12), torch.randn(3, 5, 9)))
    return model.double(), program


@functools.cache
def adapted(name: str) -> Any:
    """A PEFT model with two adapters of other ranks and modules, both of them active."""
    model: Any = zoo.build(name, "sdpa", layers=2).model
    for place, own in enumerate(NAMES):
        torch.manual_seed(place)
        config = peft.LoraConfig(
            r=2 + place,
            target_modules=TARGETS[name][place],
            init_lora_weights=False,
            use_rslora=bool(place),
            fan_in_fan_out=name == "gpt2",
        )
        if place == 0:
            model = peft.get_peft_model(model, config, adapter_name=own)
        else:
            model.add_adapter(own, config)
    model.base_model.set_adapter(list(NAMES))
    return model.eval()


@pytest.mark.parametrize("name", TARGETS)
def test_rows_are_those_of_each_adapter_alone(name: str) -> None:
    model = adapted(name)
    sample = zoo.build(name, "sdpa", layers=2)
    model.base_model.set_adapter(list(NAMES))
    program = Pipeline([Canonicalize()]).run(
        capture_module(model.get_base_model(), (), sample.kwargs)
    )
    program = served(program)
    inputs = sample.other_inputs(batch=4, length=7)
    chosen = torch.tensor([1, -1, 0, 1], dtype=torch.int32)
    flat = [*inputs.values(), chosen]
    wide, found = run(program, flat, float64=True)[0], run(program, flat)[0]
    for row, number in enumerate(chosen.tolist()):
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        with torch.no_grad():
            if number < 0:
                with model.disable_adapter():
                    wanted = model(**own)[0]
            else:
                model.base_model.set_adapter(NAMES[number])
                wanted = model(**own)[0]
        gap = (found[row] - wide[row]).norm() / wide[row].norm()
        assert gap <= 64 * torch.finfo(torch.float32).eps
        assert (wanted[0] - wide[row]).norm() / wide[row].norm() <= 4 * gap


class Odd(nn.Module):
    """Two branches, of which one has something that no plain branch has."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        rank = 11 if kind == "wide" else 2
        self.base = nn.Linear(12, 20)
        self.a, self.b = nn.Linear(12, 2, bias=False), nn.Linear(2, 20, bias=False)
        self.c = nn.Linear(12, rank, bias=False)
        self.d = nn.Linear(rank, 20, bias=kind == "bias")
        self.scale = nn.Parameter(torch.rand(20))
        self.more = nn.Linear(12, 20, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x) + self.b(self.a(x))
        other = self.d(self.c(x))
        if self.kind == "scaled":
            other = other * self.scale
        return y + other + (self.more(x) if self.kind == "second" else 0)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("bias", "has a bias"),
        ("scaled", "scales by a weight"),
        ("wide", "rank 11 is no cheaper"),
        ("second", "2 of its 4 products are no branches"),
    ],
)
def test_near_misses_say_why(kind: str, said: str) -> None:
    with pytest.raises(CannotServe, match=said):
        served(captured(Odd(kind), torch.randn(3, 5, 12)))


def test_nothing_to_serve() -> None:
    with pytest.raises(CannotServe, match="no such sum"):
        served(captured(nn.Linear(12, 20), torch.randn(3, 5, 12)))
    for step in (ServeAdapters(), ServeAdapters("folder", branches=True)):
        with pytest.raises(WrongOption, match="no adapters, or folders and branches at once"):
            Pipeline([step]).run(captured(nn.Linear(12, 20), torch.randn(3, 5, 12)))
