"""Cutting experts: what is left equals the program whose router never chooses those that went."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import planish
import pytest
import torch
import zoo
from captured import captured, kept
from cut_checks import gap
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.codegen.target import export_program
from planish.ir.capture import capture_module
from planish.ir.edit import Editor
from planish.ir.errors import WrongOption
from planish.ir.expert_cut import CannotCutExperts, cut_expert_rows
from planish.ir.expert_layers import ExpertLayer, expert_layers
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.ir.read_hf_folder import read_hf_folder
from planish.ir.rewrite import Journal
from planish.ir.text import value_names
from planish.passes.contract import Context
from planish.passes.cut_experts import count_experts, cut_experts
from planish.passes.expert_importance import expert_importance
from planish.recipes import pipeline
from torch import Tensor, nn

ATEN = torch.ops.aten
LINEAR = ATEN.linear.default
NEVER = float("-inf")
# sums of at most some hundred terms, through two layers, in float64
LIMIT = 4096 * torch.finfo(torch.float64).eps
_ROUTED: dict[str, Any] = {"moe_intermediate_size": 28, "num_experts_per_tok": 2}
# configuration class, options over those of a listed architecture, experts of each routed layer
MODELS: dict[str, tuple[str, str, Mapping[str, Any], list[int]]] = {
    "mixtral": ("mixtral", "MixtralConfig", {}, [4, 4]),
    "gpt_oss": ("gpt_oss", "GptOssConfig", {}, [4, 4]),  # biases of experts and of the router
    "deepseek_v3": ("deepseek_v3", "DeepseekV3Config", {"n_routed_experts": 12}, [12]),  # groups
    "qwen2_moe": (
        "llama",
        "Qwen2MoeConfig",
        {**_ROUTED, "num_experts": 6, "shared_expert_intermediate_size": 36},
        [6, 6],
    ),
    "qwen3_moe": ("llama", "Qwen3MoeConfig", {**_ROUTED, "num_experts": 6}, [6, 6]),
    "olmoe": (
        "llama",
        "OlmoeConfig",
        {"num_experts": 6, "num_experts_per_tok": 3, "head_dim": 8},
        [6, 6],
    ),
}


def program_of(name: str, attention: zoo.Attention | None = None) -> Program:
    listed, config, options, _ = MODELS[name]
    form = zoo.ARCHITECTURES[listed]
    attention = attention or form.attentions[0]
    if name == listed and not options:
        return pipeline("raise").run(captured(name, attention))

    def capture() -> Program:
        architecture = dataclasses.replace(
            form, config_class=config, options={**form.options, **options}
        )
        model = zoo._model(architecture, attention, 2, 0)
        return capture_module(model, (), zoo._inputs(architecture, 2, 19, 0))

    made = f"{config} {sorted({**form.options, **options}.items())}"
    key = f"{name}-{attention}-{hashlib.sha256(made.encode()).hexdigest()[:12]}"
    return pipeline("raise").run(kept(key, capture))


def context(program: Program, *batches: list[Any]) -> Context:
    return Context(Journal(program), calibration=list(batches))


def never_chosen(program: Program, layer: ExpertLayer, gone: Sequence[int]) -> None:
    """Set what the router says of these experts to -inf, in place."""
    for node in list(program.graph.nodes):
        reads = [n for n in node.all_input_nodes if str(n.target) in layer.weights]
        flat = [n for n in reads if len(n.meta["val"].shape) == 1]
        if flat and node.target is not LINEAR:  # a correction bias, added behind the router
            name = str(flat[0].target)
            program.weights[name] = program.weights[name].index_fill(0, torch.tensor(gone), NEVER)
            return
    for node in list(program.graph.nodes):
        if node.target is LINEAR and str(node.args[1].target) in layer.weights:  # type: ignore[union-attr]
            bias = torch.zeros(layer.experts)
            if len(node.args) > 2 and node.args[2] is not None:
                bias = program.weights[str(node.args[2].target)].clone()  # type: ignore[union-attr]
            bias[list(gone)] = NEVER
            made = Editor(program).weight(f"{layer.module}.silent", bias)
            node.args = (*node.args[:2], made)
            return
    raise AssertionError("no router")


def check(program: Program, place: int, stay: Sequence[int]) -> None:
    twin, made = program.copy(), program.copy()
    layer = expert_layers(made)[place]
    gone = [number for number in range(layer.experts) if number not in stay]
    never_chosen(twin, expert_layers(twin)[place], gone)
    cut_expert_rows(made, layer, stay)
    made.graph.lint()
    assert gap(twin, made) <= LIMIT
    assert count_experts(made)[place] == len(stay)
    rows = {str(made.weights.shape(name)[axis]) for name, axis in layer.weights.items()}
    assert rows == {str(len(stay))}
    lost = program.parameter_count() - made.parameter_count()
    shapes = [(program.weights.shape(name), axis) for name, axis in layer.weights.items()]
    assert lost == sum(shape.numel() // shape[axis] for shape, axis in shapes) * len(gone)
    again = twin.copy()  # experts that are never chosen are cut out of it without a trace
    cut_expert_rows(again, expert_layers(again)[place], stay)
    assert gap(twin, again) <= LIMIT


def stays(layer: ExpertLayer) -> list[int]:
    """As few as may stay, the last of each group."""
    size = layer.experts // layer.groups
    few = layer.least // layer.groups
    return [size * (group + 1) - few + i for group in range(layer.groups) for i in range(few)]


@pytest.mark.parametrize("name", MODELS)
def test_a_cut_is_a_router_that_never_chooses(name: str) -> None:
    program = program_of(name)
    layers = expert_layers(program)
    assert [layer.experts for layer in layers] == MODELS[name][3]
    assert not any(layer.why_not for layer in layers)
    for place, layer in enumerate(layers):
        check(program, place, stays(layer))


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_the_other_form_of_attention(name: str) -> None:
    program = program_of(name, "eager")
    check(program, 0, stays(expert_layers(program)[0]))


@given(st.data())
@settings(max_examples=4, deadline=None)
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_any_experts_that_may_stay(name: str, data: st.DataObject) -> None:
    program = _kept_programs.setdefault(name, program_of(name))
    place = data.draw(st.integers(0, len(expert_layers(program)) - 1))
    layer = expert_layers(program)[place]
    size = layer.experts // layer.groups
    few = data.draw(st.integers(layer.least // layer.groups, size - 1))
    chosen = st.sets(st.integers(0, size - 1), min_size=few, max_size=few)
    stay = [size * group + i for group in range(layer.groups) for i in data.draw(chosen)]
    check(program, place, sorted(stay))


_kept_programs: dict[str, Program] = {}


def test_grouped_routing_keeps_groups_alike() -> None:
    program = program_of("deepseek_v3")  # 2 groups of 6, of which one is chosen, then 2 experts
    (layer,) = expert_layers(program)
    assert (layer.groups, layer.least) == (2, 4)
    with pytest.raises(CannotCutExperts, match=r"4, 6, 8, 10 that stay, the same number of each"):
        cut_experts(program.copy(), context(program), [3])
    with pytest.raises(CannotCutExperts, match="of different sizes"):
        cut_expert_rows(program, layer, [0, 1, 2, 3, 4, 6])
    listed = pipeline("raise").run(captured("deepseek_v3", "sdpa"))
    with pytest.raises(CannotCutExperts, match="all of them that stay"):
        cut_experts(listed, context(listed), [2])


def weighted_norms(program: Program, batch: list[Any]) -> Tensor:
    """What each expert of mixtral's first layer adds, float64[4]: written out from its weights."""
    names, values = value_names(program.graph), dict[str, Any]()
    run(program, batch, watch=lambda node, value: values.__setitem__(names[node], value))
    mlp = "model.layers.0.mlp"
    x = values[f"{mlp}.reshape"].double()
    scores = (x @ program.weights[f"{mlp}.gate.weight"].double().T).softmax(-1)
    best, chosen = scores.topk(2)
    best = best / best.sum(-1, keepdim=True)
    found = torch.zeros(4, dtype=torch.float64)
    for expert in range(4):
        up = program.weights[f"{mlp}.experts.gate_up_proj"][expert].double()
        down = program.weights[f"{mlp}.experts.down_proj"][expert].double()
        gate, wide = (x @ up.T).chunk(2, -1)
        y = (torch.nn.functional.silu(gate) * wide) @ down.T
        mass = (best * (chosen == expert)).sum(-1)
        found[expert] = (mass * y.norm(dim=-1)).sum()
    return found


def test_what_gives_least_goes() -> None:
    program = program_of("mixtral")
    batches = [list(program.examples), [v[:1] for v in program.examples]]
    found = expert_importance(program, expert_layers(program), context(program, *batches))
    wanted = sum((weighted_norms(program, batch) for batch in batches), torch.zeros(4))
    # in float32, sums of 48 and of 80 products
    assert torch.allclose(found[0], wanted, rtol=128 * torch.finfo(torch.float32).eps)
    told = context(program, *batches)
    cut_experts(program, told, [1, 2])
    assert count_experts(program) == [3, 2]
    notes = [record.note for record in told.journal.applied_records(program)]
    gone = int(wanted.argmin())
    assert notes[0] == f"1 of 4 experts of model.layers.0.mlp.experts: {gone}"


def test_without_batches_the_smallest_weights_go() -> None:
    program = program_of("mixtral")
    name = "model.layers.1.mlp.experts.down_proj"
    scale = torch.tensor([1.0, 1.0, 1e-3, 1.0])[:, None, None]
    program.weights[name] = program.weights[name] * scale
    up = name.replace("down_proj", "gate_up_proj")
    program.weights[up] = program.weights[up] * scale
    told = context(program)
    cut_experts(program, told, [0, 1])
    (record,) = told.journal.applied_records(program)
    assert record.note == "1 of 4 experts of model.layers.1.mlp.experts: 2"


def test_refusals_say_what_to_do() -> None:
    program = program_of("mixtral")
    before = str(program)
    with pytest.raises(WrongOption, match="one for each routed layer"):
        cut_experts(program, context(program), [1])
    with pytest.raises(WrongOption, match="do not fit"):
        cut_experts(program, context(program), [-1, 0])
    with pytest.raises(CannotCutExperts, match=r"1 of the 4 experts .* cannot stay"):
        cut_experts(program, context(program), [0, 3])
    cut_experts(program, context(program), [0, 0])
    assert str(program) == before
    assert count_experts(planish.trace(nn.Linear(3, 5), (torch.randn(2, 3),))) == []


class Routed(nn.Module):
    """Two of four experts for each token; a form of its own for each near miss."""

    def __init__(self, form: str = "") -> None:
        super().__init__()
        self.form = form
        self.router = nn.Linear(6, 4)
        self.up = nn.Parameter(torch.randn(4, 6, 10))
        self.down = nn.Parameter(torch.randn(4, 10, 6))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        if self.form == "mean":
            scores = scores - scores.mean(-1, keepdim=True)
        best, chosen = scores.softmax(-1).topk(2)
        if self.form == "arithmetic":
            chosen = (chosen + 1) % 4
        wide = torch.relu(torch.einsum("ni,nkio->nko", x, self.up[chosen]))
        y = torch.einsum("nko,nkoi,nk->ni", wide, self.down[chosen], best)
        return y + self.router.bias.cumsum(0).sum() if self.form == "other use" else y


def routed(form: str = "") -> Program:
    torch.manual_seed(0)
    return pipeline("raise").run(planish.trace(Routed(form), (torch.randn(5, 6),)))


def test_text_before_and_after() -> None:
    program = routed()
    (layer,) = expert_layers(program)
    cut_expert_rows(program, layer, [0, 1, 3])
    body = [line.strip() for line in str(program).splitlines()]
    assert [line for line in body if line.startswith(("%up ", "%router", "%softmax", "%topk"))] == [
        "%router = linear(%x, %router.weight, %router.bias) : f32[n0, 3]",
        "%softmax = softmax(%router, -1) : f32[n0, 3]",
        "%topk = topk(%softmax, 2) : (f32[n0, 2], i64[n0, 2])",
    ]
    shapes = {name: tuple(program.weights.shape(name)) for name in program.weights}
    assert shapes == {
        "router.weight": (3, 6),
        "router.bias": (3,),
        "up": (3, 6, 10),
        "down": (3, 10, 6),
    }


@pytest.mark.parametrize(
    ("form", "why"),
    [
        ("mean", "mean.* is not followed along the experts"),
        ("other use", "cumsum.* is not followed along the experts"),
    ],
)
def test_what_is_not_understood_is_refused(form: str, why: str) -> None:
    program = routed(form)
    before = str(program)
    with pytest.raises(CannotCutExperts, match=why):
        cut_experts(program, context(program), [1])
    assert str(program) == before


def test_numbers_that_are_computed_with_choose_no_experts() -> None:
    assert count_experts(routed("arithmetic")) == []


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("mixtral", "num_local_experts"),
        pytest.param("deepseek_v3", "n_routed_experts", marks=pytest.mark.slow),
    ],
)
def test_a_folder_with_fewer_experts_loads(name: str, entry: str, tmp_path: Path) -> None:
    listed, _, options, (experts, *_) = MODELS[name]
    form = zoo.ARCHITECTURES[listed]
    architecture = dataclasses.replace(form, options={**form.options, **options})
    model = zoo._model(architecture, "eager", 2, 0)
    inputs = zoo._inputs(architecture, 2, 19, 0)
    program = pipeline("raise").run(planish.trace(model, (), inputs))
    cut_experts(program, context(program), [2] * len(count_experts(program)))
    folder = export_program(program, tmp_path / "out", "huggingface")
    assert json.loads((folder / "config.json").read_text())[entry] == experts - 2
    flat = program.flatten_inputs((), inputs)
    wide, native = run(program, flat, float64=True)[0], run(program, flat)[0]
    with torch.no_grad():
        theirs = read_hf_folder(folder, attention="eager")(**inputs)[0]
    assert (theirs - wide).norm() <= 8 * (native - wide).norm()
