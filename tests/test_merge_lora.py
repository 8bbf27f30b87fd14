"""merge_lora: golden text, PEFT's own merged weights, spellings, near misses, random branches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import build
import peft
import pytest
import torch
import zoo
from captured import captured
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.ir.capture import capture_module
from planish.ir.formats import AffineInt
from planish.ir.pattern import op
from planish.ir.program import Program
from planish.ir.text import program_text
from planish.passes.canonicalize import Canonicalize
from planish.passes.merge_lora import MergeLora
from planish.passes.pipeline import Pipeline
from planish.passes.share_subexpressions import ShareSubexpressions
from torch import Tensor, nn
from torch.nn import functional as F

RANDOM = {"init_lora_weights": False, "r": 3}


def seeded(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


def merge(program: Program) -> Program:
    """The pipeline holds the pass to its bounds at every touched value."""
    passes = [Canonicalize(), MergeLora()]
    return Pipeline(passes, verify="numbers", on_break="raise").run(program)


def capture(model: nn.Module, *shape: int) -> Program:
    torch.manual_seed(1)
    return capture_module(model, (torch.randn(shape or (2, 3, 6)),))


def applied(program: Program) -> int:
    return len(program.history.records[-1].applied)


def declined(program: Program) -> list[str]:
    assert not applied(program)
    return [entry.reason for entry in program.history.records[-1].declined]


def products(program: Program) -> int:
    words = ("linear", "addmm", "mm", "bmm", "matmul", "conv", "einsum")
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    return sum(any(w in str(n.target).split(".")[1] for w in words) for n in calls)


class Branch(nn.Module):
    """W x + 2 B (A x), with W [10, 6] and rank 2."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 10)
        self.a, self.b = nn.Linear(6, 2, bias=False), nn.Linear(2, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x)) * 2


def test_a_low_rank_branch_goes_into_the_weight() -> None:
    model = seeded(Branch())
    after = merge(capture(model))
    assert program_text(after, weights=True) == (
        "%x : f32[n0, 3, 6]\n"
        "%base.weight = weight : f32[10, 6]\n"
        "%base.bias = weight : f32[10]\n"
        "%base = linear(%x, %base.weight, %base.bias) : f32[n0, 3, 10]\n"
        "return [%base]"
    )
    with torch.no_grad():
        wide = [w.double() for w in (model.base.weight, model.a.weight, model.b.weight)]
    assert torch.equal(after.weights["base.weight"], (wide[0] + 2 * wide[2] @ wide[1]).float())
    assert torch.equal(after.weights["base.bias"], model.base.bias)


def peft_case(name: str, config: Any) -> tuple[nn.Module, Program]:
    """A tiny model with a random adapter, and its program with the adapter unmerged."""
    sample = zoo.build(name, "sdpa", layers=1)
    torch.manual_seed(0)
    model = peft.get_peft_model(sample.model, config).eval()
    for key, parameter in model.named_parameters():
        if any(word in key for word in ("ia3", "vera_lambda", "magnitude", "beft")):
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model, capture_module(model.get_base_model(), sample.args, sample.kwargs)


PEFT: dict[str, tuple[str, Callable[[], Any], int]] = {
    "lora": ("llama", lambda: peft.LoraConfig(target_modules="all-linear", **RANDOM), 7),
    "rslora": (
        "llama",
        lambda: peft.LoraConfig(target_modules=["q_proj"], use_rslora=True, **RANDOM),
        1,
    ),
    "dora": (
        "llama",
        lambda: peft.LoraConfig(target_modules=["q_proj", "down_proj"], use_dora=True, **RANDOM),
        2,
    ),
    "loha": (
        "llama",
        lambda: peft.LoHaConfig(r=3, target_modules=["q_proj"], init_weights=False),
        1,
    ),
    "lokr": (
        "llama",
        lambda: peft.LoKrConfig(r=3, target_modules=["q_proj"], init_weights=False),
        1,
    ),
    "vera": (
        "llama",
        lambda: peft.VeraConfig(r=3, target_modules=["down_proj"], init_weights=False),
        1,
    ),
    "ia3": (
        "llama",
        lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        3,
    ),
    "experts": (
        "mixtral",
        lambda: peft.LoraConfig(
            target_modules=["q_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            **RANDOM,
        ),
        3,
    ),
    "transposed": (
        "gpt2",
        lambda: peft.LoraConfig(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **RANDOM),
        3,
    ),
    "transposed dora": (
        "gpt2",
        lambda: peft.LoraConfig(
            target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True, **RANDOM
        ),
        1,
    ),
    "transposed ia3": (
        "gpt2",
        lambda: peft.IA3Config(
            target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]
        ),
        2,
    ),
    "embedding": (
        "bert",
        lambda: peft.LoraConfig(
            target_modules=["query", "word_embeddings", "dense"], bias="all", **RANDOM
        ),
        6,
    ),
    "lora bias": (
        "bert",
        lambda: peft.LoraConfig(target_modules=["query"], lora_bias=True, **RANDOM),
        1,
    ),
    "adalora": (
        "llama",
        lambda: peft.AdaLoraConfig(
            init_r=3, total_step=9, target_modules=["q_proj", "down_proj"], init_lora_weights=False
        ),
        2,
    ),
    "hira": (
        "llama",
        lambda: peft.HiraConfig(r=3, target_modules=["q_proj", "down_proj"], init_weights=False),
        2,
    ),
    "bitfit": ("bert", lambda: peft.BeftConfig(target_modules=["query", "output.dense"]), 3),
    "convolution": (
        "vit",
        lambda: peft.LoraConfig(target_modules=["projection", "q_proj"], **RANDOM),
        2,
    ),
}


@pytest.mark.parametrize("case", PEFT)
def test_it_is_what_peft_merges(case: str) -> None:
    """Equal to PEFT's merged weights to the rounding of its float32 sums of W and s B A.

    PEFT rounds the products of rank 3, the scaling and the sum one by one: with the factors of a
    float64 product below the size of the weights and of the change, that is a few half units in
    the last place of the largest of them.
    """
    name, config, count = PEFT[case]
    model, program = peft_case(name, config())
    before = {key: program.weights[key] for key in program.weights}
    after = merge(program)
    assert applied(after) == count
    plain = Pipeline([Canonicalize(), ShareSubexpressions()]).run(captured_one_layer(name))
    once = Pipeline([ShareSubexpressions()]).run(after)  # what an addition in place wrote twice
    assert len(once.graph.nodes) == len(plain.graph.nodes)  # nothing of the adapter is left
    wanted = model.merge_and_unload().state_dict()
    compared = 0
    for key in after.weights:
        merged = wanted.get(key.replace(".base_layer", ""))
        if merged is None or after.weights.entry(key) is before.get(key):
            continue
        size = max(float(before[key].abs().max()), float(merged.abs().max()))
        gap = (after.weights[key] - merged).abs().max()
        assert gap <= 16 * torch.finfo(torch.float32).eps * size
        compared += 1
    assert compared >= count


class Shifted(nn.Module):
    """A product with a vector added to it twice; what else may be added is no bias of its own."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.base = nn.Linear(6, 10, bias=kind != "no bias")
        shape = {"by place": (3, 10), "one number": (1,)}.get(kind, (10,))
        self.first, self.second = nn.Parameter(torch.rand(shape)), nn.Parameter(torch.rand(10))
        self.read_twice = kind == "read twice"

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        shifted = y + self.first + self.second if self.first.numel() == 10 else y + self.first
        return shifted * y if self.read_twice else shifted


def test_a_bias_that_was_trained_apart_goes_into_the_bias() -> None:
    model = seeded(Shifted())
    after = merge(capture(model))
    assert program_text(after) == (
        "%x : f32[n0, 3, 6]\n"
        "%base = linear(%x, %base.weight, %base.bias) : f32[n0, 3, 10]\n"
        "return [%base]"
    )
    bias = model.base.bias.double() + model.first.double() + model.second.double()
    assert torch.equal(after.weights["base.bias"], bias.float())
    assert torch.equal(after.weights["base.weight"], model.base.weight)
    assert [a.note for a in after.history.records[-1].applied] == ["what is added is in the bias"]


@pytest.mark.parametrize("kind", ["no bias", "by place", "one number", "read twice"])
def test_what_is_added_and_no_bias_stays(kind: str) -> None:
    after = merge(capture(seeded(Shifted(kind))))
    assert applied(after) == 0 and not declined(after)


@functools.cache
def captured_one_layer(name: str) -> Program:
    sample = zoo.build(name, "sdpa", layers=1)
    return capture_module(sample.model, sample.args, sample.kwargs)


class Reordered(Branch):
    """The residual is added before the branch, and it is another value."""

    def forward(self, x: Tensor) -> Tensor:
        other = torch.tanh(x).repeat(1, 1, 2)[..., :10]
        return other + self.base(x) + self.b(self.a(x))


class Matmuls(Branch):
    def forward(self, x: Tensor) -> Tensor:
        change = x @ self.a.weight.T @ self.b.weight.T
        return torch.sub(x @ self.base.weight.T, change, alpha=-0.25) + self.base.bias


class Einsums(Branch):
    def forward(self, x: Tensor) -> Tensor:
        low = torch.einsum("bsi,ri->bsr", x, self.a.weight)
        return self.base(x) + torch.einsum("bsr,or->bso", low, self.b.weight) / 3


class Flattened(Branch):
    """The base multiplies rows, the branch a batch of them."""

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.base.bias, x.reshape(-1, 6), self.base.weight.T)
        return rows.view(*x.shape[:-1], 10) + self.b(self.a(x))


class Stacked(Branch):
    """Two adapters, the second written as a change of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight + 0.5 * self.b.weight @ self.a.weight
        return F.linear(x, weight) + self.b(self.a(x)) * 2


class Vectors(Branch):
    """VeRA's two vectors, and a magnitude in front of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.d, self.e = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(10))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.e * self.b(self.d * self.a(x))


class Convolved(nn.Module):
    """A convolution over three places and a low-rank one beside it."""

    def __init__(self) -> None:
        super().__init__()
        options: dict[str, Any] = {"padding": 1, "stride": 2}
        self.base = nn.Conv1d(6, 10, 3, **options)
        self.a, self.b = nn.Conv1d(6, 2, 3, bias=False, **options), nn.Conv1d(2, 10, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * self.b(self.a(x))


class Batched(nn.Module):
    """Experts side by side: [experts, in, out] weights."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(2, 6, 10))
        self.a, self.b = nn.Parameter(torch.empty(2, 6, 3)), nn.Parameter(torch.empty(2, 3, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = x.expand(2, -1, -1)
        return torch.bmm(x, self.w) + torch.bmm(torch.bmm(x, self.a), self.b) * 0.5


SPELLINGS: list[tuple[type[nn.Module], tuple[int, ...]]] = [
    (Reordered, (2, 3, 6)),
    (Matmuls, (2, 3, 6)),
    (Einsums, (2, 3, 6)),
    (Flattened, (2, 3, 6)),
    (Stacked, (2, 3, 6)),
    (Vectors, (2, 3, 6)),
    (Convolved, (2, 6, 9)),
]


@pytest.mark.parametrize(("kind", "shape"), SPELLINGS)
def test_spellings(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    after = merge(capture(seeded(kind()), *shape))
    assert products(after) == 1
    assert not after.history.records[-1].declined


def test_matrices_side_by_side() -> None:
    model = seeded(Batched())
    torch.manual_seed(1)
    example = (torch.randn(1, 5, 6),)
    after = merge(capture_module(model, example, dynamic_shapes=({1: torch.export.Dim.DYNAMIC},)))
    assert products(after) == 1
    assert after.weights.shape("w") == (2, 6, 10)


def test_a_shared_layer_is_merged_once_for_all_its_places() -> None:
    class Shared(Branch):
        def forward(self, x: Tensor) -> Tensor:
            once = super().forward(x)
            return super().forward(torch.tanh(once)[..., :6])

    model = seeded(Shared())
    after = merge(capture(model))
    assert products(after) == 2
    assert list(after.weights) == ["base.weight", "base.bias"]


class LowRank(Branch):
    """Low rank by design: two branches of rank 2 in parallel, no base."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Linear(6, 1, bias=False), nn.Linear(1, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) + self.d(self.c(x))


class Residual(Branch):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(2, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x))


class Twice(Branch):
    def forward(self, x: Tensor) -> Tensor:
        base = self.base(x)
        return (base + self.b(self.a(x))) * torch.tanh(base)


class Tied(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sum() + F.linear(torch.tanh(x), self.base.weight)


class Different(Branch):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Linear(6, 1, bias=False), nn.Linear(1, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        return self.base(x) + self.b(self.a(x)), self.base(y) + self.d(self.c(y))  # type: ignore[return-value]


def test_near_misses_say_why() -> None:
    def reasons(kind: type[nn.Module]) -> list[str]:
        return declined(merge(capture(seeded(kind()))))

    assert reasons(LowRank) == [
        "its branches take 48 multiplications a row, one product would take 60"
    ]
    assert reasons(Residual) == [
        "its branches take 24 multiplications a row, one product would take 36"
    ]
    assert reasons(Twice) == ["%linear is read by %tanh too, so it stays beside a merged one"]
    assert reasons(Tied) == ["%base.weight is read by %linear_3 too, and stays what it is"]
    assert reasons(Different) == 2 * ["%base.weight is read by 2 branches with other adapters"]


def test_an_encoded_base_is_left_alone() -> None:
    program = capture(seeded(Branch()))
    form = AffineInt(bits=8)
    program.weights["base.weight"] = form.encode(program.weights["base.weight"])
    after = Pipeline([MergeLora()]).run(program)
    assert declined(after) == [
        f"base.weight is kept as {form.name}: merge adapters before quantizing"
    ]


class PackedParts(nn.Module):
    """One product for query, key and value; adapters beside the query and the value."""

    def __init__(self, bias: bool = True, overlap: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 15, bias=bias)
        self.a, self.b = nn.Linear(6, 2, bias=False), nn.Linear(2, 7, bias=True)
        self.c, self.d = nn.Linear(6, 1, bias=False), nn.Linear(1, 4, bias=False)
        self.overlap = overlap

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        packed = self.qkv(x)
        q, k, v = packed.split((7, 4, 4), -1)
        k = packed[..., 5:11] if self.overlap else k
        return q + self.b(self.a(x)) * 2, torch.tanh(k), v - self.d(self.c(x))


def test_parts_of_a_packed_product_take_their_adapters() -> None:
    model = seeded(PackedParts())
    after = merge(capture(model))
    assert products(after) == 1
    assert applied(after) == 2
    with torch.no_grad():
        wide = model.qkv.weight.double().clone()
        wide[:7] += 2 * model.b.weight.double() @ model.a.weight.double()
        wide[11:] -= model.d.weight.double() @ model.c.weight.double()
    # summed in float64 and rounded once: at most half a unit of the last place
    gap = (after.weights["qkv.weight"].double() - wide).abs()
    assert bool((gap <= 0.51 * torch.finfo(torch.float32).eps * wide.abs()).all())
    assert list(after.weights) == ["qkv.weight", "qkv.bias"]


def test_near_misses_of_packed_products_say_why() -> None:
    without = merge(capture(seeded(PackedParts(bias=False)))).history.records[-1]
    assert [entry.reason for entry in without.declined] == [
        "%linear has no bias and its adapter has one"
    ]
    after = merge(capture(seeded(PackedParts(overlap=True)))).history.records[-1]
    assert [entry.reason for entry in after.declined] == [
        "%slice_1 reads the same channels of %linear"
    ]


def test_what_would_not_be_finite_is_left_alone() -> None:
    class Huge(Branch):
        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.b(self.a(x)) * 1e30 * 1e20

    after = Pipeline([MergeLora()]).run(capture(seeded(Huge())))
    assert declined(after) == ["base.weight would not be finite"]


class Bottleneck(Branch):
    """An adapter that is not linear (Houlsby)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(torch.relu(self.a(x)))


class Gated(Branch):
    """A branch of which the input decides how much it counts."""

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + torch.sigmoid(x.sum(-1, keepdim=True)) * self.b(self.a(x))


class Factored(Branch):
    """A layer of low rank, nothing beside it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x[..., :1]) + self.b(self.a(x))


class Normed(Branch):
    """A norm's weight before a product is a norm's, not an adapter's."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return self.base(self.w * normed) * 0.125


@pytest.mark.parametrize("kind", [Bottleneck, Gated, Factored, Normed])
def test_what_is_no_adapter_is_passed_over(kind: type[nn.Module]) -> None:
    assert declined(merge(capture(seeded(kind())))) == []


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_a_model_without_adapters_stays_as_it_is(name: str) -> None:
    program = captured(name, zoo.ARCHITECTURES[name].attentions[0])
    after = Pipeline([Canonicalize(), MergeLora()]).run(program)
    assert declined(after) == []
    assert after.history.records[-1].nodes[0] == after.history.records[-1].nodes[1]


FACTORS = [0.0, 1.0, -2.0, 0.3, 1e-42, 1e4]


@st.composite
def branches(draw: st.DrawFn) -> list[tuple[list[int], float, bool]]:
    """Per branch: the widths between 7 inputs and 11 outputs, a factor, whether it is divided."""
    widths = st.lists(st.integers(1, 3), max_size=2)
    return draw(
        st.lists(st.tuples(widths, st.sampled_from(FACTORS), st.booleans()), min_size=1, max_size=4)
    )


@given(branches(), st.integers(0, 99), st.booleans())
@settings(max_examples=40, deadline=None)
def test_random_branches(
    parts: list[tuple[list[int], float, bool]], seed: int, biased: bool
) -> None:
    """A base product and any branches beside it become one, within the pipeline's bounds."""
    random = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {"base": torch.randn(11, 7, generator=random)}
    if biased:
        weights["bias"] = torch.randn(11, generator=random)
    for i, (widths, _, _) in enumerate(parts):
        sizes = [7, *widths, 11]
        for j, (a, b) in enumerate(pairwise(sizes)):
            weights[f"branch.{i}.{j}"] = torch.randn(b, a, generator=random)

    def body(x: Any, *nodes: Any) -> Any:
        named = dict(zip(weights, nodes, strict=True))
        total = op.linear(x, named["base"], *([named["bias"]] if biased else []))
        for i, (widths, factor, divided) in enumerate(parts):
            value = x
            for j in range(len(widths) + 1):
                value = op.linear(value, named[f"branch.{i}.{j}"])
            inverse = divided and abs(factor) > 1e-30  # 1 / 1e-42 is more than float32 holds
            value = op.div(value, 1 / factor) if inverse else op.mul(value, factor)
            total = op.add(total, value) if i % 2 else op.sub(value, total)
        return total

    program = build.program(body, {"x": torch.randn(3, 7, generator=random)}, weights)
    after = Pipeline([MergeLora()], verify="numbers", on_break="raise").run(program)
    assert products(after) == 1
