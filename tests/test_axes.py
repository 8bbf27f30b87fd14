"""Axis flow and scale edges: counted by hand, proven by moving factors, near misses told."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import build
import pytest
import random_programs
import torch
import zoo
from captured import captured
from edge_counts import COUNTS
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.ir.axes import Flow
from planish.ir.formats import AffineInt
from planish.ir.interpret import run
from planish.ir.move_scale import move_scale
from planish.ir.numerics import relative_error
from planish.ir.pattern import op
from planish.ir.program import Program
from planish.ir.program_folder import load_program
from planish.ir.scale_edges import ScaleEdge, scale_edges
from planish.recipes import pipeline
from torch import Tensor

# A run in float64 rounds 2^29 times finer than one in float32; the rest is the growth that a
# BOUNDED contract allows.
FINER, GROWTH = 2.0**-29, 8.0
RECIPES = ("raw", "raise", "exact")
LARGE = ("t5", "bart", "whisper", "deepseek_v3", "mixtral", "bert", "vit")  # second form: slow
RAW = ("gemma", "gpt2", "cohere", "mixtral", "bert")  # norms spelled out, Conv1D, experts


def first_form(name: str, attention: str) -> bool:
    return attention == zoo.ARCHITECTURES[name].attentions[0]


def quick(name: str, attention: str, recipe: str) -> bool:
    if first_form(name, attention):
        return recipe == "raise" or (recipe == "raw" and name in RAW)
    return recipe == "raise" and name not in LARGE


CASES = [
    pytest.param(
        name,
        attention,
        recipe,
        id=f"{name}-{attention}-{recipe}",
        marks=() if quick(name, attention, recipe) else pytest.mark.slow,
    )
    for name, attention in zoo.CASES
    for recipe in RECIPES
]


@functools.cache
def prepared(name: str, attention: zoo.Attention, recipe: str) -> Program:
    program = captured(name, attention)
    return program if recipe == "raw" else pipeline(recipe, verify="structure").run(program)


def widened(program: Program) -> Program:
    """With float64 weights, so that moved factors are not rounded to float32."""
    wide = program.copy()
    for name in wide.weights:
        if wide.weights.dtype(name).is_floating_point:
            wide.weights[name] = wide.weights[name].double()
    return wide


def moved(program: Program, edges: list[ScaleEdge], seed: int = 0) -> Program:
    """Random positive factors, mostly between 1/7 and 7, along every free edge."""
    generator = torch.Generator().manual_seed(seed)
    program = program.copy()
    for edge in edges:
        if edge.free:
            move_scale(program, edge, torch.randn(edge.factors, generator=generator).exp())
    return program


def worst(found: list[Any], wanted: list[Any]) -> float:
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if isinstance(b, Tensor)]
    return max(relative_error(a, b) for a, b in pairs if b.is_floating_point())


@pytest.mark.parametrize(("name", "attention", "recipe"), CASES)
def test_counts_and_factors(name: str, attention: zoo.Attention, recipe: str) -> None:
    program = prepared(name, attention, recipe)
    edges = scale_edges(program)
    kinds = Counter(edge.kind for edge in edges if edge.free)
    wanted = COUNTS[name]
    assert kinds["norm->linear"] >= wanted.norms
    assert kinds["v->o"] >= wanted.values
    assert kinds["up->down"] >= wanted.ups
    assert kinds["fc1->fc2"] >= wanted.relus
    if recipe == "raise":  # captured, other operations come first; fused, weights are one
        for weight, reason in wanted.blocked.items():
            told = [
                edge.reason
                for edge in edges
                if not edge.free and any(end.weight == weight for end in edge.producers)
            ]
            assert any(reason in sentence for sentence in told), (weight, told)
    wide, inputs = widened(program), list(program.examples)
    reference = run(wide, inputs, float64=True)
    limit = GROWTH * FINER * worst(run(program, inputs), reference)
    after = run(moved(wide, edges), inputs, float64=True)
    assert worst(after, reference) <= limit


@settings(max_examples=60, deadline=None)
@given(random_programs.steps(), st.integers(0, 9))
def test_random_programs_keep_their_function(steps: Any, seed: int) -> None:
    program = random_programs.program(steps)
    inputs = random_programs.inputs()
    wide = widened(program)
    reference = run(wide, inputs, float64=True)
    after = run(moved(wide, scale_edges(program), seed), inputs, float64=True)
    for a, b in zip(after, reference, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12 * float(b.abs().max()))


X, WIDE, HIDDEN, OUT = (2, 5, 6), 6, 10, 7


def mlp(middle: Any, **more: Any) -> Program:
    """linear [10, 6], something, linear [7, 10]."""
    generator = torch.Generator().manual_seed(3)
    weights = {
        "fc1.w": torch.randn(HIDDEN, WIDE, generator=generator),
        "fc1.b": torch.randn(HIDDEN, generator=generator),
        "fc2.w": torch.randn(OUT, HIDDEN, generator=generator),
        "norm.w": torch.rand(HIDDEN, generator=generator) + 0.5,
        **more,
    }

    def body(x: Any, w1: Any, b1: Any, w2: Any, norm: Any, *others: Any) -> Any:
        h = op.linear(x, w1, b1)
        return middle(h, w2, norm, *others)

    return build.program(body, {"x": torch.randn(X)}, weights)


def sentences(program: Program) -> str:
    return "\n".join(edge.sentence() for edge in scale_edges(program))


def test_relu_passes_and_says_so() -> None:
    program = mlp(lambda h, w2, norm: op.linear(op.relu(h), w2))
    assert sentences(program).splitlines()[0] == ("fc1->fc2: 10 factors from fc1.w, fc1.b to fc2.w")


NEAR_MISSES = {
    "gelu": (lambda h, w2, n: op.linear(op.gelu(h), w2), "gelu %gelu_default does not pass a fa"),
    "tanh": (lambda h, w2, n: op.linear(op.tanh(h), w2), "tanh %tanh_default does not pass a f"),
    "clamp": (lambda h, w2, n: op.linear(op.clamp(h, -1, 1), w2), "it cuts values at fixed num"),
    "plus 1": (lambda h, w2, n: op.linear(op.add(h, 1), w2), "adds 1, which takes no factor"),
    "residual": (
        lambda h, w2, n: (op.linear(h, w2), op.rms_norm(op.add(h, op.relu(h)), n, 1e-5)),
        "the sum %add_tensor joins it with other values (a residual); rms_norm %rms_norm_default "
        "takes statistics of it",
    ),
    "returned": (lambda h, w2, n: (op.linear(h, w2), op.relu(h)), "%relu_default is returned"),
    "mixed": (
        lambda h, w2, n: op.linear(op.sub(h, op.mean(h, [-1], True)), w2),
        "it mixes channels",
    ),
    "square": (
        lambda h, w2, n: op.linear(op.mul(h, h), w2),
        "%mul_tensor multiplies it with a value",
    ),
    "divides": (lambda h, w2, n: op.linear(op.div(op.relu(h), h), w2), "%div_tensor divides by it"),
    "no reader": (lambda h, w2, n: op.sum(op.mul(h, 2), [-1]), "it mixes channels"),
    "table": (lambda h, w2, n: op.linear(op.where(op.gt(h, 0), h, 1.0), w2), "does not pass"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_told(name: str) -> None:
    middle, sentence = NEAR_MISSES[name]
    program = mlp(middle)
    assert not any(e.free and e.name == "fc1.w" for e in scale_edges(program))
    assert sentence in sentences(program)


def test_norm_with_offset_takes_factors_on_one_plus_w() -> None:
    program = mlp(lambda h, w2, n: op.linear(op.rms_norm(op.gelu(h), n, 1e-5, 1.0), w2))
    (edge,) = [e for e in scale_edges(program) if e.free]
    assert edge.producers[0].offset == 1.0
    before = program.weights["norm.w"].clone()
    factors = torch.linspace(0.25, 4, HIDDEN, dtype=torch.float64)
    move_scale(program, edge, factors)
    assert torch.equal(program.weights["norm.w"], ((1 + before.double()) / factors - 1).float())


def test_a_norm_feeds_two_products_and_both_take_the_factor() -> None:
    other = torch.randn(3, HIDDEN)
    program = mlp(
        lambda h, w2, n, w3: (lambda y: (op.linear(y, w2), op.linear(y, w3)))(
            op.rms_norm(h, n, 1e-5)
        ),
        **{"fc3.w": other},
    )
    (edge,) = [e for e in scale_edges(program) if e.free]
    assert [end.weight for end in edge.consumers] == ["fc2.w", "fc3.w"]


def test_a_norm_read_by_something_else_is_blocked() -> None:
    program = mlp(
        lambda h, w2, n: (lambda y: (op.linear(y, w2), op.softmax(y, -1)))(op.rms_norm(h, n, 1e-5))
    )
    assert not any(edge.free for edge in scale_edges(program))
    assert "softmax %softmax_int does not pass a factor on" in sentences(program)


def test_a_table_read_in_two_roles_is_tied() -> None:
    weights = {"t": torch.randn(11, 6), "n": torch.rand(6) + 0.5}

    def body(ids: Any, table: Any, norm: Any) -> Any:
        return op.linear(op.rms_norm(op.embedding(table, ids), norm, 1e-5), table)

    program = build.program(body, {"ids": torch.zeros(2, 3, dtype=torch.int64)}, weights)
    assert "t is tied: its axis 1 is read here and makes channels elsewhere" in sentences(program)
    assert not any(edge.free for edge in scale_edges(program))


def test_shared_weights_are_one_edge() -> None:
    program = mlp(
        lambda h, w2, n: op.add(op.linear(op.relu(h), w2), op.linear(op.mul(op.relu(h), 2), w2))
    )
    (edge,) = [e for e in scale_edges(program) if e.free]
    assert len(edge.consumers[0].readings) == 2


def test_encoded_weights_are_left_alone() -> None:
    program = mlp(lambda h, w2, norm: op.linear(op.relu(h), w2))
    program.weights["fc2.w"] = AffineInt(8, None, True).encode(program.weights["fc2.w"])
    assert "fc2.w is encoded already" in sentences(program)


def test_grouped_values_share_their_factors() -> None:
    """Two key-value heads of 5 channels, six query heads: 10 factors for 30 columns."""
    weights = {
        "q": torch.randn(30, 7),
        "k": torch.randn(10, 7),
        "v": torch.randn(10, 7),
        "o": torch.randn(4, 30),
    }

    def body(x: Any, *w: Any) -> Any:
        q, k, v = (
            op.transpose(op.reshape(op.linear(x, w[i]), [-1, 3, heads, 5]), 1, 2)
            for i, heads in ((0, 6), (1, 2), (2, 2))
        )
        y = op.reshape(op.transpose(op.attention(q, k, v, scale=0.4), 1, 2), [-1, 3, 30])
        return op.linear(y, w[3])

    program = build.program(body, {"x": torch.randn(2, 3, 7)}, weights)
    (edge,) = [e for e in scale_edges(program) if e.free]
    assert edge.sentence() == "v->o: 10 factors from v to o, each shared by 3 channels read"
    shared = edge.consumers[0].channel.reshape(2, 3, 5)
    assert bool((shared == torch.arange(10).reshape(2, 1, 5)).all())


def test_stored_places_choose_channels() -> None:
    """Values are the last third of each packed head, chosen by a stored index (as in Falcon)."""
    weights = {
        "qkv": torch.randn(24, 7),
        "place": torch.tensor([2]),
        "o": torch.randn(4, 8),
    }

    def body(x: Any, qkv: Any, place: Any, o: Any) -> Any:
        heads = op.reshape(op.linear(x, qkv), [-1, 2, 3, 4])
        return op.linear(op.reshape(op.index(heads, [None, None, place]), [-1, 8]), o)

    program = build.program(body, {"x": torch.randn(5, 7)}, weights)
    edges = scale_edges(program)
    (free,) = [edge for edge in edges if edge.free]
    taken = (free.producers[0].channel >= 0).nonzero().flatten().tolist()
    assert taken == [*range(8, 12), *range(20, 24)] and free.factors == 8


def test_width_classes_follow_the_residual_stream() -> None:
    """Every weight axis that holds hidden channels is in one class per channel."""
    program = prepared("llama", "sdpa", "raise")
    flow = Flow(program, "width")
    roots = flow.channels.solve().roots
    stream = roots[flow.weight_axes["model.embed_tokens.weight", 1].numpy()]
    holding = {
        key for key, ids in flow.weight_axes.items() if set(roots[ids.numpy()]) == set(stream)
    }
    layer = "model.layers.1."
    assert {
        (f"{layer}self_attn.q_proj.weight", 1),
        (f"{layer}self_attn.o_proj.weight", 0),
        (f"{layer}mlp.down_proj.weight", 0),
        (f"{layer}mlp.up_proj.weight", 1),
        (f"{layer}input_layernorm.weight", 0),
        ("model.norm.weight", 0),
        ("lm_head.weight", 1),
    } <= holding
    rows = (f"{layer}mlp.{part}_proj.weight" for part in ("gate", "up"))
    gate, up = (roots[flow.weight_axes[name, 0].numpy()] for name in rows)
    down = roots[flow.weight_axes[f"{layer}mlp.down_proj.weight", 1].numpy()]
    assert (gate == up).all() and (up == down).all()
    q, k = (roots[flow.weight_axes[f"{layer}self_attn.{n}_proj.weight", 0].numpy()] for n in "qk")
    # Six query heads of ten channels on two key heads; the halves of a head are rotated in pairs.
    assert (q.reshape(2, 3, 2, 5) == k.reshape(2, 1, 2, 5)).all()
    assert (k.reshape(2, 2, 5)[:, :1] == k.reshape(2, 2, 5)).all()


@pytest.mark.slow
def test_every_edge_of_a_real_model(smollm2_folder: Any, tmp_path: Any) -> None:
    """61 norms, of which the last meets a tied head; 30 values, 30 MLPs."""
    import planish

    program = planish.trace(smollm2_folder)
    kinds = Counter((edge.kind, edge.free) for edge in scale_edges(program))
    assert kinds["norm->linear", True] == 60 and kinds["norm->linear", False] == 1
    assert kinds["v->o", True] == 30 and kinds["up->down", True] == 30


def test_loading_keeps_edges(tmp_path: Any) -> None:
    from planish.ir.program_folder import save_program

    program = prepared("qwen2", "sdpa", "raise")
    save_program(program, tmp_path / "saved")
    again = load_program(tmp_path / "saved")
    assert [e.sentence() for e in scale_edges(again)] == [
        e.sentence() for e in scale_edges(program)
    ]
