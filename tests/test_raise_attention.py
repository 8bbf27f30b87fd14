"""Attention in every spelling is raised, its masks are proven, and near misses say why they are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from captured import captured, sample
from planish.ir.capture import capture_module
from planish.ir.history import PassRecord
from planish.ir.interpret import run
from planish.ir.pattern import bound_arguments
from planish.ir.program import Program
from planish.ir.text import program_text
from planish.passes.canonicalize import Canonicalize
from planish.passes.drop_dead import DropDead
from planish.passes.mask_positions import Form, formula, recognize, whole
from planish.passes.pipeline import Pipeline
from planish.passes.raise_attention import RaiseAttention
from torch import Tensor, nn
from torch.export import Dim

ATTENTION = torch.ops.planish.attention.default
F = nn.functional

Seen = tuple[bool, int, float, bool, str]
"""causal, window, softcap, sinks, mask: none, keys ([.., 1, keys]) or scores ([.., q, keys])."""

PADDED: Seen = (True, 0, 0.0, False, "keys")
BIASED: Seen = (True, 0, 0.0, False, "scores")
CAUSAL: Seen = (True, 0, 0.0, False, "none")
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


def raise_attention(
    program: Program, probes: list[list[Any]] | None = None
) -> tuple[Program, PassRecord]:
    steps = [Canonicalize(), DropDead(), RaiseAttention(), DropDead()]
    line = Pipeline(steps, verify="numbers" if probes else "structure", on_break="raise")
    after = line.run(program, probes=probes or [])
    return after, after.history.records[-2]


def seen(program: Program) -> list[Seen]:
    found: list[Seen] = []
    for node in program.graph.nodes:
        if node.target is ATTENTION:
            a = bound_arguments(node)
            kind = "none"
            if a["mask"] is not None:
                kind = "keys" if a["mask"].meta["val"].shape[-2] == 1 else "scores"
            found.append((a["causal"], a["window"], a["softcap"], a["sinks"] is not None, kind))
    return found


def squares(program: Program) -> list[str]:
    """Values whose last two axes are both the free length."""
    found: list[str] = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        sizes = value.shape[-2:] if isinstance(value, Tensor) else ()
        if (
            len(sizes) == 2
            and isinstance(sizes[0], torch.SymInt)
            and str(sizes[0]) == str(sizes[1])
        ):
            found.append(f"{node.name}: {list(value.shape)}")
    return found


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_every_architecture(name: str, attention: zoo.Attention) -> None:
    program, made = captured(name, attention), sample(name, attention)
    probes = [program.flatten_inputs((), made.kwargs)]
    probes.append(program.flatten_inputs((), made.other_inputs()))
    after, record = raise_attention(program, probes)
    assert Counter(seen(after)) == Counter(EXPECTED[name])
    assert (len(record.applied), record.declined) == (len(EXPECTED[name]), [])
    assert {entry.note for entry in record.applied} == {""}
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


class Function(nn.Module):
    """A function of q, k, v [batch, heads, length, channels] as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        return self.function(q, k, v, pad)


BATCH, HEADS, QUERIES, KEYS, CHANNELS, VALUES = 2, 6, 7, 11, 10, 12


def inputs(queries: int = QUERIES, keys: int = KEYS, heads: int = HEADS) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(queries)
    q = torch.randn(BATCH, HEADS, queries, CHANNELS, generator=generator)
    k = torch.randn(BATCH, heads, keys, CHANNELS, generator=generator)
    v = torch.randn(BATCH, heads, keys, VALUES, generator=generator)
    pad = torch.ones(BATCH, keys, dtype=torch.bool)
    pad[1, :3] = False
    return q, k, v, pad


def trace(function: Callable[..., Tensor], square: bool = False, heads: int = HEADS) -> Program:
    """Captured with free lengths; square: as many queries as keys."""
    args = inputs(KEYS if square else QUERIES, KEYS, heads)
    keys = Dim("keys")
    queries = keys if square else Dim("queries")
    shapes = ({2: queries}, {2: keys}, {2: keys}, {1: keys})
    return capture_module(Function(function), args, dynamic_shapes=shapes)


def raised(
    function: Callable[..., Tensor], square: bool = False, heads: int = HEADS
) -> tuple[Program, PassRecord]:
    """Raised and verified at two shapes."""
    program = trace(function, square, heads)
    other = inputs(9, 9, heads) if square else inputs(9, 5, heads)
    return raise_attention(program, [list(program.examples), list(other)])


def positions(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Of queries [q, 1] and keys [1, k]; the last query sits at the last key."""
    last = torch.arange(q.shape[2])[:, None] + (k.shape[2] - q.shape[2])
    return last, torch.arange(k.shape[2])[None, :]


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


Visible = Callable[[Tensor, Tensor], Tensor]
MASKS: list[tuple[str, Visible, tuple[bool, int] | None]] = [
    ("causal", lambda i, j: j <= i, (True, 0)),
    ("negated", lambda i, j: ~(j > i), (True, 0)),
    ("window", lambda i, j: (j <= i) & (j > i - 4), (True, 4)),
    ("window by distance", lambda i, j: (i - j < 5) & (i >= j), (True, 5)),
    ("all", lambda i, j: (i >= -99) & (j >= 0), (False, 0)),
    ("one ahead", lambda i, j: j <= i + 1, None),
    ("only later", lambda i, j: j >= i, (False, 1)),
    ("reversed", lambda i, j: j > i, None),
    ("both sides", lambda i, j: (j - i).abs() < 3, None),
    ("causal in blocks", lambda i, j: (j <= i) & (j // 4 == i // 4), None),
    ("causal but for the far", lambda i, j: (j <= i) | (j > 70), None),
]


@pytest.mark.parametrize(("name", "visible", "expected"), MASKS)
def test_masks_are_proven_or_stay(
    name: str, visible: Visible, expected: tuple[bool, int] | None
) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, visible(*positions(q, k)), scale=1.0)

    after, record = raised(function, square=True)
    (found,) = seen(after)
    (note,) = [entry.note for entry in record.applied]
    if expected is None:
        assert found == (False, 0, 0.0, False, "scores")
        assert note.startswith("keeps an explicit mask: its positional part is neither causal")
    else:
        assert (found[:2], found[4], note) == (expected, "none", "")


def test_spellings_of_additive_causal_masks() -> None:
    def triangle(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        mask = torch.full((q.shape[2], k.shape[2]), -math.inf).triu(1)
        return torch.softmax(q @ k.transpose(2, 3) + mask, -1) @ v

    def subtracted(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        i, j = positions(q, k)
        mask = (1.0 - (j <= i).float()) * torch.finfo(torch.float32).min
        return torch.softmax(q @ k.transpose(2, 3) + mask, -1) @ v

    for function in (triangle, subtracted):
        after, _ = raised(function, square=True)
        assert seen(after) == [CAUSAL], function


EXPLICIT = "keeps an explicit mask: "


def test_fills_that_add_up_keep_the_mask() -> None:
    def twice(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        i, j = positions(q, k)
        lowest = torch.finfo(torch.float32).min
        mask = torch.where(j <= i, 0.0, lowest) + torch.where(pad[:, None, None], 0.0, lowest)
        return torch.softmax(q @ k.transpose(2, 3) + mask, -1) @ v

    def weak(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        mask = torch.where(pad[:, None, None], 0.0, -10000.0)
        return torch.softmax(q @ k.transpose(2, 3) + mask, -1) @ v

    notes = [raised(f, square=True)[1].applied[0].note for f in (twice, weak)]
    assert notes == [
        EXPLICIT + "several finite fills add up where a query sees no key",
        EXPLICIT + "its fill -10000 does not outweigh the scores where a query sees no key",
    ]


def second_reader(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.transpose(2, 3), -1)
    return weights @ v + weights.sum(-1, keepdim=True)


def dropped(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return F.dropout(torch.softmax(q @ k.transpose(2, 3), -1), 0.25, True) @ v


def dropped_composite(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)


def other_axis(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(2, 3), -2) @ v


def integers(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(2, 3) + pad[:, None, None].long(), -1) @ v


def powers(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return torch.softmax((q @ k.transpose(2, 3)).pow(3), -1) @ v


def upper_left(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def widened(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = q[:1] @ k[:1].transpose(2, 3) + pad[:, None, None].float()
    return torch.softmax(scores, -1) @ v


DECLINES: list[tuple[Callable[..., Tensor], str]] = [
    (second_reader, "a second reader, %sum_1, uses the softmax"),
    (dropped, "dropout is active (p=0.25)"),
    (dropped_composite, "dropout is active (p=0.5)"),
    (other_axis, "its softmax runs over axis 2 of 4, not over the last"),
    (integers, "the mask added to the scores is int64, not floating"),
    (widened, "a mask has more examples or heads than the scores"),
    (powers, "the scores pass through pow, which attention does not have"),
    (upper_left, "its causal mask starts at the first key, and keys outnumber queries"),
]


@pytest.mark.parametrize(("function", "sentence"), DECLINES)
def test_near_misses(function: Callable[..., Tensor], sentence: str) -> None:
    after, record = raise_attention(trace(function))
    assert seen(after) == []
    assert [entry.reason for entry in record.declined] == [sentence]


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


def test_recognize_takes_every_element() -> None:
    masks = [whole(torch.ones(n, n, dtype=torch.bool).tril()) for n in (3, 5, 9)]
    assert recognize(masks) == Form(causal=True)
    masks[1].visible[2, 4] = True
    assert recognize(masks).fault != ""


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
