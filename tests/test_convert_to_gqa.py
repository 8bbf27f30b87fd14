"""convert_to_gqa: every group's keys and values become their mean, however they are packed."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
import zoo
from captured import captured, sample
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planish.ir.capture import capture_module
from planish.ir.edit import Editor, shape
from planish.ir.errors import WrongOption
from planish.ir.interpret import run
from planish.ir.numerics import relative_error
from planish.ir.program import Node, Program
from planish.ir.text import program_text
from planish.passes.convert_to_gqa import ConvertToGqa
from planish.passes.drop_dead import DropDead
from planish.passes.fuse_qkv import FuseQkv
from planish.passes.insert_kv_cache import InsertKvCache, empty_past
from planish.passes.pipeline import Pipeline
from planish.recipes import pipeline
from torch import Tensor, nn
from torch.export import Dim

ATTENTION = torch.ops.planish.attention.default
GROUPED = {"llama", "qwen2", "gemma2", "mistral", "phi3", "cohere", "gpt_oss", "mixtral"}
REASONS = {
    "gemma": "it has 1 key and value heads, not more than 1",
    "deepseek_v3": "all heads share %expand_1, a part of their keys: they have one latent",
    "mamba": "",  # no attention at all
}
CASES = [
    pytest.param(
        name,
        attention,
        marks=() if attention == zoo.ARCHITECTURES[name].attentions[0] else pytest.mark.slow,
    )
    for name, attention in zoo.CASES
    if name not in REASONS
]


def attentions(program: Program) -> list[Node]:
    return [node for node in program.graph.nodes if node.target is ATTENTION]


def key_heads(program: Program) -> list[int]:
    return [shape(node.args[1])[1] for node in attentions(program)]  # type: ignore[arg-type]


def raised(name: str, attention: zoo.Attention) -> Program:
    """With weights on a grid of 2^-9, so that the mean of two of them is exact."""
    program = pipeline("raise").run(captured(name, attention))
    for weight in program.weights:
        value = program.weights[weight]
        if value.is_floating_point():
            program.weights[weight] = (value * 512).round() / 512
    return program


def averaged_in_the_graph(program: Program, groups: int) -> Program:
    """The reference: keys and values as they are, and then the mean of each group's heads."""
    program = program.copy()
    editor = Editor(program)
    for node in attentions(program):
        with editor.at(node):
            for place in (1, 2):
                source: Node = node.args[place]  # type: ignore[assignment]
                heads = shape(source)[1]
                split = editor.emit(
                    torch.ops.aten.unflatten.int, source, 1, [groups, heads // groups]
                )
                mean = editor.emit(torch.ops.aten.mean.dim, split, [2])
                node.update_arg(place, mean)
    return program


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_every_architecture_attends_to_the_mean_of_each_group(
    name: str, attention: zoo.Attention
) -> None:
    """A projection, a rotation and a factor are linear: the mean of weights is that of heads."""
    before = raised(name, attention)
    groups = 1 if name in GROUPED else 3  # from 2, and from 6 heads
    after = Pipeline([ConvertToGqa(groups)], verify="numbers", on_break="raise").run(before)
    record = after.history.records[-1]
    assert len(record.applied) == len(attentions(before)) and record.declined == []
    assert [entry.measure for entry in record.measured] == [
        "least SQNR of pooled weights (dB)",
        "relative change of the outputs",
    ]
    assert set(key_heads(after)) == {groups}
    if name == "cohere":  # its keys are normalized before they are averaged
        return
    reference = averaged_in_the_graph(before, groups)
    flat = before.flatten_inputs((), sample(name, attention).other_inputs())
    wanted, found = (run(program, flat, float64=True) for program in (reference, after))
    changed = run(before, flat, float64=True)
    assert relative_error(wanted[0], found[0]) < 1e-12
    assert relative_error(changed[0], found[0]) > 1e-3


@pytest.mark.parametrize("name", sorted(REASONS))
def test_what_is_left_alone_says_why(name: str) -> None:
    before = raised(name, zoo.ARCHITECTURES[name].attentions[0])
    after = Pipeline([ConvertToGqa(1)]).run(before)
    reasons = {entry.reason for entry in after.history.records[-1].declined}
    assert program_text(after) == program_text(before)
    if REASONS[name]:
        assert REASONS[name] in reasons
        assert len(reasons) <= len(attentions(before))
    else:
        assert reasons == set()


def hand_pooled(name: str, groups: int, state: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    """The state dict of a model with fewer key and value heads, after section 2.1 of the paper."""

    def mean(rows: Tensor) -> Tensor:
        grouped = rows.reshape(groups, heads // groups, rows.shape[0] // heads, *rows.shape[1:])
        return grouped.double().mean(1).float().flatten(0, 1)

    pooled: dict[str, Tensor] = {}
    for key, value in state.items():
        if "qkv_proj" in key:
            query, keys, values = value.split([48, 8 * heads, 8 * heads])
            value = torch.cat([query, mean(keys), mean(values)])
        elif "k_proj" in key or "v_proj" in key:
            value = mean(value)
        elif "k_norm" in key:  # a norm's weight for each head [heads, head]
            value = mean(value.flatten()).reshape(groups, -1)
        pooled[key] = value
    return pooled


@pytest.mark.parametrize("name", ["phi3", "cohere"])
def test_it_is_the_model_pooled_by_hand(name: str) -> None:
    """6 key and value heads to 2, against the model's own code: packed, and with normed keys."""
    architecture = zoo.ARCHITECTURES[name]

    def model(heads: int) -> nn.Module:
        options = {**architecture.options, "num_key_value_heads": heads, "num_hidden_layers": 1}
        config = getattr(transformers, architecture.config_class)(**options, use_cache=False)
        torch.manual_seed(0)
        made: nn.Module = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa"
        )
        return made.eval().float()

    whole, small = model(6), model(2)
    generator = torch.Generator().manual_seed(1)
    for value in whole.state_dict().values():
        value.add_(torch.randn(value.shape, generator=generator), alpha=0.1)
    small.load_state_dict(hand_pooled(name, 2, dict(whole.state_dict()), 6))
    ids = torch.randint(3, zoo.VOCABULARY, (2, 11), generator=generator)
    program = pipeline("raise").run(capture_module(whole, (), {"input_ids": ids}))
    after = Pipeline([ConvertToGqa(2)]).run(program)
    assert key_heads(after) == [2]
    saved = program.parameter_count() - after.parameter_count()
    assert saved == sum(v.numel() for v in whole.parameters()) - sum(
        v.numel() for v in small.parameters()
    )
    wide, narrow = (run(after, [ids], float64=wide)[0] for wide in (True, False))
    with torch.no_grad():
        logits = small(input_ids=ids).logits
    assert relative_error(wide, logits) <= 4 * relative_error(wide, narrow)  # float32 rounding
    unpooled = run(program, [ids], float64=True)[0]
    assert relative_error(wide, unpooled) > 1e-2


LAYOUTS = ("separate", "packed", "by head", "in columns", "normed", "turned", "partial")
HEADS, WIDTH, HIDDEN = 6, 5, 14


class _Attention(nn.Module):
    """6 heads, 5 wide, on a hidden width of 14; how query, key and value are laid out varies."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        inner = HEADS * WIDTH
        if layout in ("packed", "by head"):
            self.qkv = nn.Linear(HIDDEN, 3 * inner)
        elif layout == "in columns":
            self.weight = nn.Parameter(torch.zeros(HIDDEN, 3 * inner))
            self.bias = nn.Parameter(torch.zeros(3 * inner))
        else:
            self.q, self.k = nn.Linear(HIDDEN, inner), nn.Linear(HIDDEN, inner, bias=False)
            self.v = nn.Linear(HIDDEN, inner)
            self.norm = nn.RMSNorm(inner, eps=1e-6)
        self.out = nn.Linear(inner, 9)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in self.parts(x))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def parts(self, x: Tensor) -> list[Tensor]:
        """Query, key and value [batch, place, head, channel]."""
        form = (HEADS, WIDTH)
        if self.layout == "by head":
            packed = self.qkv(x).unflatten(-1, (HEADS, 3, WIDTH))
            return [packed[..., place, :] for place in range(3)]
        if self.layout in ("packed", "in columns"):
            flat = x.reshape(-1, HIDDEN)
            joined = (
                self.qkv(x)
                if self.layout == "packed"
                else torch.addmm(self.bias, flat, self.weight).reshape(*x.shape[:2], -1)
            )
            return [part.unflatten(-1, form) for part in joined.chunk(3, -1)]
        keys = self.norm(self.k(x)) if self.layout == "normed" else self.k(x)
        values = torch.matmul(x, self.v.weight.T) if self.layout == "partial" else self.v(x)
        found = [part.unflatten(-1, form) for part in (self.q(x), keys, values)]
        if self.layout == "partial":  # three channels of each head are computed in other ways
            k = found[1].clamp(-1.5, 1.5)
            normed = nn.functional.rms_norm(k[..., 1:3], (2,), eps=1e-6)
            found[1] = torch.cat([found[1][..., :1], normed, torch.tanh(k[..., 3:])], -1)
        if self.layout == "turned":  # a factor and a norm of each head, in another layout
            flat = found[1].transpose(1, 2).flatten(0, 1) * 0.7
            found[1] = nn.functional.rms_norm(flat.unflatten(0, (-1, HEADS)), (WIDTH,), eps=1e-6)
            found[1] = found[1].transpose(1, 2)
        return found


@functools.cache
def attending(layout: str) -> Program:
    torch.manual_seed(0)
    model = _Attention(layout)
    x = torch.randn(2, 7, HIDDEN)
    free = {"x": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    return pipeline("raise").run(capture_module(model, (x,), {}, free))


def shared_within_groups(layout: str, groups: int, seed: int) -> Program:
    """Random weights in which the key heads, and the value heads, of a group are the same."""
    program = attending(layout).copy()
    generator = torch.Generator().manual_seed(seed)

    def repeat(heads: Tensor) -> Tensor:
        """[.., heads, channel, ..] with each group's first head in place of all."""
        return heads[:: HEADS // groups].repeat_interleave(HEADS // groups, 0)

    for name in list(program.weights):
        value = torch.randn(program.weights.shape(name), generator=generator)
        if name.startswith(("k.", "v.", "norm.")):
            value = repeat(value.unflatten(0, (HEADS, WIDTH))).flatten(0, 1)
        elif name.startswith("qkv.") or name in ("weight", "bias"):
            rows = value.t() if name == "weight" else value
            by_head = layout == "by head"
            split = rows.unflatten(0, (HEADS, 3, WIDTH) if by_head else (3, HEADS, WIDTH))
            q, k, v = split.unbind(1 if by_head else 0)
            joined = torch.stack([q, repeat(k), repeat(v)], 1 if by_head else 0).flatten(0, 2)
            value = joined.t().contiguous() if name == "weight" else joined
        program.weights[name] = value
    return program


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    groups=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
)
def test_equal_heads_are_pooled_without_loss(
    layout: str, groups: int, seed: int, batch: int, length: int
) -> None:
    before = shared_within_groups(layout, groups, seed)
    after = Pipeline([ConvertToGqa(groups)]).run(before)
    assert key_heads(after) == [groups]
    note = after.history.records[-1].applied[0].note
    assert note == f"6 heads to {groups}, SQNR of the pooled weights: keys inf dB, values inf dB"
    x = torch.randn(batch, length, HIDDEN, generator=torch.Generator().manual_seed(seed))
    wanted, found = (run(program, [x], float64=True)[0] for program in (before, after))
    assert relative_error(wanted, found) < 1e-13


GOLDEN = """\
%x : f32[n0, n1, 14]
%out.weight = weight : f32[9, 30]
%out.bias = weight : f32[9]
%qkv.keys.weight = weight : f32[10, 14]
%qkv.keys.bias = weight : f32[10]
%qkv.values.weight = weight : f32[10, 14]
%qkv.values.bias = weight : f32[10]
%qkv.queries.weight = weight : f32[30, 14]
%qkv.queries.bias = weight : f32[30]
%sym_size = sym_size(%x, 0) : int n0
%sym_size_1 = sym_size(%x, 1) : int n1
%qkv.linear = linear(%x, %qkv.keys.weight, %qkv.keys.bias) : f32[n0, n1, 10]
%reshape = reshape(%qkv.linear, [%sym_size, %sym_size_1, 2, 5]) : f32[n0, n1, 2, 5]
%transpose = transpose(%reshape, 1, 2) : f32[n0, 2, n1, 5]
%qkv.linear_1 = linear(%x, %qkv.values.weight, %qkv.values.bias) : f32[n0, n1, 10]
%reshape_1 = reshape(%qkv.linear_1, [%sym_size, %sym_size_1, 2, 5]) : f32[n0, n1, 2, 5]
%transpose_1 = transpose(%reshape_1, 1, 2) : f32[n0, 2, n1, 5]
%qkv.linear_2 = linear(%x, %qkv.queries.weight, %qkv.queries.bias) : f32[n0, n1, 30]
%reshape_2 = reshape(%qkv.linear_2, [%sym_size, %sym_size_1, 6, 5]) : f32[n0, n1, 6, 5]
%transpose_2 = transpose(%reshape_2, 1, 2) : f32[n0, 6, n1, 5]
%attention = attention(%transpose_2, %transpose, %transpose_1, scale=0.5, causal=True) : \
f32[n0, 6, n1, 5]
%transpose_3 = transpose(%attention, 1, 2) : f32[n0, n1, 6, 5]
%reshape_3 = reshape(%transpose_3, [%sym_size, %sym_size_1, 30]) : f32[n0, n1, 30]
%out = linear(%reshape_3, %out.weight, %out.bias) : f32[n0, n1, 9]
return [%out]"""


def test_golden_text_of_a_packed_projection() -> None:
    after = Pipeline([ConvertToGqa(2)]).run(attending("by head"))
    assert program_text(after, weights=True) == GOLDEN


def test_grouped_queries_become_fewer_groups_and_fuse_again() -> None:
    """6 heads to 3, and 3 to 1, is 6 to 1; fuse_qkv joins the parts of a packed projection."""
    whole = attending("packed")
    twice = Pipeline([ConvertToGqa(3), ConvertToGqa(1)]).run(whole)
    once = Pipeline([ConvertToGqa(1), FuseQkv(), DropDead()]).run(whole)
    x = torch.randn(3, 8, HIDDEN)
    assert key_heads(twice) == key_heads(once) == [1]
    wanted, found = (run(program, [x], float64=True)[0] for program in (once, twice))
    assert relative_error(wanted, found) < 1e-6  # means of float32 means
    linears = [n for n in once.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert [shape(n)[-1] for n in linears] == [(HEADS + 2) * WIDTH, 9]


def test_the_cache_is_smaller() -> None:
    made = sample("gpt2", "sdpa")
    program = capture_module(made.model, (), {"input_ids": made.kwargs["input_ids"]})
    whole = pipeline("raise").run(program)
    pooled = Pipeline([ConvertToGqa(2), InsertKvCache()]).run(whole)
    plain = Pipeline([InsertKvCache()]).run(whole)
    assert {past.shape[1] for past in empty_past(plain, 2)} == {6}
    assert {past.shape[1] for past in empty_past(pooled, 2)} == {2}


class _Other(_Attention):
    """Near misses: what cannot be pooled."""

    def __init__(self, why: str) -> None:
        super().__init__("separate")
        self.why = why
        self.shared = nn.Linear(HIDDEN, WIDTH)
        if why == "tied":
            self.v.weight = self.k.weight

    def parts(self, x: Tensor) -> list[Tensor]:
        if self.why == "computed":
            keys = nn.functional.linear(x, self.k.weight * 2).unflatten(-1, (HEADS, WIDTH))
        elif self.why == "summed":
            keys = self.k(x).cumsum(1).unflatten(-1, (HEADS, WIDTH))
        elif self.why == "some heads":
            keys = self.k(x).unflatten(-1, (HEADS, WIDTH))
            keys = torch.cat([keys[:, :, :2], keys[:, :, 2:] * 0.7], 2)
        elif self.why == "repeated":
            keys = self.k(x).unflatten(-1, (HEADS, WIDTH))
            keys = torch.cat([keys[..., :3], keys[..., :2] * 0.7], -1)
        elif self.why == "two projections":
            keys = torch.cat([self.k(x).chunk(2, -1)[0], self.q(x).chunk(2, -1)[1]], -1)
            keys = keys.unflatten(-1, (HEADS, WIDTH))
        elif self.why == "given":
            keys = x[..., None, :WIDTH].expand(*x.shape[:2], HEADS, WIDTH)
        else:
            keys = self.k(x).unflatten(-1, (HEADS, WIDTH))
        query, values = self.q(x).unflatten(-1, (HEADS, WIDTH)), self.v(x)
        if self.why == "latent":
            latent = self.shared(x)[:, :, None].expand(-1, -1, HEADS, -1)
            keys, query = torch.cat([keys, latent], -1), torch.cat([query, query], -1)
        return [query, keys, values.unflatten(-1, (HEADS, WIDTH))]

    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x)
        return result + self.k(x).mean() if self.why == "read twice" else result


def declined(program: Program, groups: int = 2) -> list[str]:
    after = Pipeline([ConvertToGqa(groups)]).run(program)
    assert program_text(after) == program_text(program)
    return [entry.reason for entry in after.history.records[-1].declined]


@functools.cache
def near_miss(why: str) -> Program:
    torch.manual_seed(0)
    free = {"x": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    return pipeline("raise").run(
        capture_module(_Other(why), (torch.randn(2, 7, HIDDEN),), {}, free)
    )


@pytest.mark.parametrize(
    ("why", "sentence"),
    [
        ("tied", "the weight k.weight of its keys is tied: %linear_2 reads it as well"),
        ("computed", "%mul, which %linear multiplies by, is not a weight"),
        ("summed", "the keys come from %cumsum = cumsum, which is none of projection, layout, "),
        ("some heads", " works on some heads or scattered channels only"),
        ("repeated", "the keys do not keep the channels of %linear"),
        ("two projections", "the keys are joined of %linear and %linear_1"),
        ("given", "the keys are not computed here but come in as %x"),
        ("latent", ", a part of their keys: they have one latent"),
        ("read twice", "%mean reads its keys as well"),
    ],
)
def test_near_misses_decline_with_a_sentence(why: str, sentence: str) -> None:
    (reason,) = declined(near_miss(why))
    assert sentence in reason


def test_groups_must_divide_the_heads() -> None:
    assert declined(attending("packed"), 4) == ["6 key and value heads do not make 4 equal groups"]
    assert declined(attending("packed"), 6) == ["it has 6 key and value heads, not more than 6"]
    with pytest.raises(WrongOption, match="groups cannot be 0"):
        ConvertToGqa(0)


def test_a_cached_program_is_left_alone() -> None:
    cached = attending("packed").copy()
    cached.facts |= {"cached"}
    assert declined(cached) == ["it reads a KV cache: convert_to_gqa goes before insert_kv_cache"]
