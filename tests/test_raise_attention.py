"""Attention in every spelling is raised, its masks are proven, and near misses say why they are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from attention_programs import (
    ATTENTION,
    CAUSAL,
    CHANNELS,
    HEADS,
    KEYS,
    QUERIES,
    VALUES,
    Seen,
    inputs,
    positions,
    raise_attention,
    raised,
    seen,
    squares,
    trace,
)
from captured import captured, sample
from planish.ir.capture import capture_module
from planish.ir.interpret import run
from planish.ir.text import program_text
from planish.passes.canonicalize import Canonicalize
from planish.passes.drop_dead import DropDead
from planish.passes.mask_positions import formula
from planish.passes.pipeline import Pipeline
from planish.passes.raise_attention import RaiseAttention
from torch import Tensor, nn

F = nn.functional

PADDED: Seen = (True, 0, 0.0, False, "keys")
BIASED: Seen = (True, 0, 0.0, False, "scores")
ENCODER: Seen = (False, 0, 0.0, False, "keys")
BARE: Seen = (False, 0, 0.0, False, "none")
EXPECTED: dict[str, list[Seen]] = {
    "llama": [PADDED] * 2,
    "qwen2": [PADDED] * 2,
    "gemma": [PADDED] * 2,
    "phi3": [PADDED] * 2,
    "gpt2": [PADDED] * 2,
    "opt": [PADDED] * 2,
    "bloom": [PADDED] * 2,
    "cohere": [PADDED] * 2,
    "mixtral": [PADDED] * 2,
    "deepseek_v3": [PADDED] * 2,
    "mistral": [(True, zoo.WINDOW, 0.0, False, "keys")] * 2,
    "gemma2": [(True, zoo.WINDOW, 3.0, False, "keys"), (True, 0, 3.0, False, "keys")],
    "gpt_oss": [(True, zoo.WINDOW, 0.0, True, "keys"), (True, 0, 0.0, True, "keys")],
    "bert": [ENCODER] * 2,
    "distilbert": [ENCODER] * 2,
    "vit": [BARE] * 2,
    "t5": [(False, 0, 0.0, False, "scores")] * 2 + [BIASED, ENCODER] * 2,
    "bart": [ENCODER] * 2 + [CAUSAL, ENCODER] * 2,
    "whisper": [BARE] * 2 + [CAUSAL, BARE] * 2,
}
CASES = [case for case in zoo.CASES if case[0] in EXPECTED]


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_every_architecture(name: str, attention: zoo.Attention) -> None:
    program, made = captured(name, attention), sample(name, attention)
    probes = [program.flatten_inputs((), made.kwargs)]
    probes.append(program.flatten_inputs((), made.other_inputs()))
    after, record = raise_attention(program, probes)
    assert Counter(seen(after)) == Counter(EXPECTED[name])
    assert (len(record.applied), record.declined) == (len(EXPECTED[name]), [])
    told = {"", "keeps a bias of queries by keys"} if name == "t5" else {""}
    assert {entry.note for entry in record.applied} == told
    for node in after.graph.nodes:
        if node.target is ATTENTION and name in ("llama", "qwen2", "mistral", "gemma", "gpt_oss"):
            groups = 1 if name == "gemma" else 2
            assert [node.args[i].meta["val"].shape[1] for i in (0, 1, 2)] == [6, groups, groups]


UNPADDED = ["llama", "mistral", "qwen2", "gemma", "phi3", "gpt2", "opt", "mixtral"]


@pytest.mark.parametrize("name", UNPADDED)
def test_without_padding_no_mask_is_computed(name: str) -> None:
    """Nothing of [length, length] is left in the graph."""
    made = zoo.build(name, "eager" if name in ("llama", "mistral") else "sdpa", layers=1)
    ids = made.kwargs["input_ids"]
    program = capture_module(made.model, (), {"input_ids": ids})
    after, _ = raise_attention(program, [program.flatten_inputs((), {"input_ids": ids})])
    window = zoo.WINDOW if name == "mistral" else 0
    assert seen(after) == [(True, window, 0.0, False, "none")]
    assert squares(program) != []
    assert squares(after) == []


def eager(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    i, j = positions(q, k)
    visible = (j <= i)[None, None] & pad[:, None, None, :]
    mask = torch.where(visible, 0.0, torch.finfo(q.dtype).min)
    return torch.softmax(q @ k.transpose(-1, -2) * 0.25 + mask, -1) @ v


def composite(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    i, j = positions(q, k)
    visible = (j <= i)[None, None] & pad[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, visible, scale=0.25)


GOLDEN = """\
%q : f32[2, 6, n0, 10]
%k : f32[2, 6, n1, 10]
%v : f32[2, 6, n1, 12]
%pad : bool[2, n1]
%unsqueeze = unsqueeze(%pad, 1) : bool[2, 1, n1]
%unsqueeze_1 = unsqueeze(%unsqueeze, 2) : bool[2, 1, 1, n1]
%attention = attention(%q, %k, %v, %unsqueeze_1, scale=0.25, causal=True{more}) \
: f32[2, 6, n0, 12]
return [%attention]"""


@pytest.mark.parametrize(
    ("spelling", "more"), [(eager, ", uniform_if_blind=True"), (composite, "")]
)
def test_golden_text(spelling: Callable[..., Tensor], more: str) -> None:
    after, _ = raised(spelling)
    assert program_text(after) == GOLDEN.format(more=more)


def test_grouped_heads_enter_ungrouped() -> None:
    def repeated(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(3, 1) for x in (k, v))
        return torch.softmax(q @ k.transpose(2, 3), -1) @ v

    def native(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=1.0, enable_gqa=True)

    for function in (repeated, native):
        after, _ = raised(function, heads=2)
        call = next(n for n in after.graph.nodes if n.target is ATTENTION)
        assert [a.name for a in call.args[:3]] == ["q", "k", "v"]


def test_scales_are_multiplied_wherever_they_stand() -> None:
    def scaled(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        scores = (q * 0.5) @ (k / 4.0).transpose(2, 3) * 3.0
        mask = pad[:, None, None, :].float() * 1.5
        return torch.softmax((scores * 2.0 + mask) / 0.7, -1) @ v

    after, _ = raised(scaled)
    call = next(n for n in after.graph.nodes if n.target is ATTENTION)
    assert call.kwargs["scale"] == pytest.approx(0.5 / 4.0 * 3.0 * 2.0 / 0.7, rel=1e-15)
    assert [a.name for a in call.args[:2]] == ["q", "k"]


def test_a_scale_applied_twice_counts_twice() -> None:
    def twice(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q * 0.3, k, v, scale=0.3)

    def default(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q / math.sqrt(CHANNELS), k, v)

    for function, scale in ((twice, 0.09), (default, 1 / CHANNELS)):
        after, _ = raised(function)
        (call,) = [n for n in after.graph.nodes if n.target is ATTENTION]
        assert call.kwargs["scale"] == pytest.approx(scale, rel=1e-15)
        assert call.args[0].name == "q"


def test_a_scale_under_a_rotary_embedding() -> None:
    def rotated(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        angles = torch.arange(q.shape[2])[:, None] * 0.1 ** torch.arange(CHANNELS / 2)
        q = torch.ops.planish.rotary(q * 0.3, angles.cos(), angles.sin())
        return torch.softmax(q @ k.transpose(2, 3), -1) @ v

    after, _ = raised(rotated)
    (call,) = [n for n in after.graph.nodes if n.target is ATTENTION]
    assert call.kwargs["scale"] == pytest.approx(0.3, rel=1e-15)
    assert call.args[0].args[0].name == "q"


def test_a_scale_that_is_computed_from_constants() -> None:
    def computed(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        scale = torch.sqrt(torch.tensor(float(CHANNELS)) * 3)
        return torch.softmax(q @ (k / scale).transpose(2, 3), -1) @ v

    after, _ = raised(computed)
    (call,) = [n for n in after.graph.nodes if n.target is ATTENTION]
    assert call.kwargs["scale"] == pytest.approx(1 / math.sqrt(3 * CHANNELS), rel=1e-6)


def test_one_temperature_for_each_head() -> None:
    """A factor that all keys of a query share goes to the query."""

    def cosine(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(2, 3)
        scores = torch.arange(1.0, HEADS + 1)[:, None, None] * scores / q.mean(-1, keepdim=True)
        return torch.softmax(scores.masked_fill(~pad[:, None, None], -1e38), -1) @ v

    after, record = raised(cosine)
    assert (seen(after), record.declined) == ([(False, 0, 0.0, False, "keys")], [])


def test_an_integer_mask_is_added() -> None:
    def integers(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        scores = q @ k.transpose(2, 3) + pad[:, None, None].long() * 3 + pad[:, None, None]
        return torch.softmax(scores, -1) @ v

    after, _ = raised(integers)
    (call,) = [n for n in after.graph.nodes if n.target is ATTENTION]
    assert call.args[3].meta["val"].dtype == torch.float32


def test_soft_cap_of_scaled_scores() -> None:
    def capped(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        scores = torch.tanh(q @ k.transpose(2, 3) * 0.3 / 5.0) * 5.0
        i, j = positions(q, k)
        return torch.softmax(scores.masked_fill(j > i, -math.inf), -1) @ v

    after, _ = raised(capped, square=True)
    call = next(n for n in after.graph.nodes if n.target is ATTENTION)
    assert (call.kwargs["softcap"], call.kwargs["causal"]) == (5.0, True)
    assert call.kwargs["scale"] == pytest.approx(0.3, rel=1e-15)


def test_einsum_and_joined_heads() -> None:
    def einsum(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        weights = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k), -1)
        return torch.einsum("bhqk,bhkd->bqhd", weights, v)

    def joined(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        q3, k3, v3 = (x.flatten(0, 1) for x in (q, k, v))
        bias = pad.float()[:, None, None, :].expand(-1, HEADS, 1, -1).flatten(0, 1)
        scores = torch.baddbmm(bias, q3, k3.transpose(1, 2), alpha=0.25)
        return torch.bmm(torch.softmax(scores, -1), v3)

    def single(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        q, k, v = q[:, 0], k[:, 0], v[:, 0]
        scores = torch.bmm(q, k.transpose(1, 2)).masked_fill(~pad[:, None, :], -1e38)
        return torch.bmm(torch.softmax(scores, -1), v)

    for function in (einsum, joined, single):
        after, record = raised(function)
        assert (len(seen(after)), record.declined) == (1, []), function


def test_a_softmax_that_weighs_no_values_is_no_candidate() -> None:
    after, record = raise_attention(trace(lambda q, k, v, pad: torch.softmax(v, -1) * 2.0))
    assert (seen(after), record.declined) == ([], [])


def test_equal_masks_are_built_once() -> None:
    def twice(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        return eager(q, k, v, pad) + eager(q + 1.0, k, v, pad)

    program = trace(twice, square=True)
    from planish.passes.share_subexpressions import ShareSubexpressions

    steps = [Canonicalize(), ShareSubexpressions(), RaiseAttention(), DropDead()]
    after = Pipeline(steps).run(program)
    calls = [n for n in after.graph.nodes if n.target is ATTENTION]
    assert len(calls) == 2 and calls[0].args[3] is calls[1].args[3]


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("additive", [False, True])
def test_reference_against_the_formula(uniform: bool, softcap: float, additive: bool) -> None:
    """The operation itself, in float64, blind queries included."""
    q, k, v, pad = (x.double() if x.is_floating_point() else x for x in inputs(heads=2))
    visible = pad[:, None, None, :] & formula(
        torch.arange(QUERIES) + KEYS - QUERIES, torch.arange(KEYS), True, 4
    )
    scores = 0.3 * torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(3, 1))
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores.masked_fill(~visible, torch.finfo(torch.float64).min)
    wanted = torch.softmax(scores, -1) @ v.repeat_interleave(3, 1)
    blind = ~visible.any(-1, keepdim=True)
    if not uniform:
        wanted = wanted.masked_fill(blind, 0.0)
    mask: Tensor = pad[:, None, None, :]
    if additive and (uniform or not softcap):
        low = torch.finfo(torch.float32).min if uniform else -math.inf
        mask = torch.where(mask, 0.0, low).double()
    options: dict[str, Any] = {"scale": 0.3, "causal": True, "window": 4, "softcap": softcap}
    found = torch.ops.planish.attention(q, k, v, mask, uniform_if_blind=uniform, **options)
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)


def test_blind_queries_of_both_spellings_keep_their_value() -> None:
    """The first three queries of the second example see no key."""
    for spelling in (eager, composite):
        program = trace(spelling, square=True)
        after, _ = raise_attention(program)
        before = run(program, program.examples)[0]
        assert torch.allclose(run(after, program.examples)[0], before, atol=1e-6)
        mean = program.examples[2][1].mean(1) if spelling is eager else torch.zeros(())
        assert torch.allclose(before[1, :, 0], mean.expand(HEADS, VALUES), atol=1e-6)
