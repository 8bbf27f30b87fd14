"""Cutting layers and branches: what is left equals the program whose branches give 0."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import planish
import pytest
import torch
import zoo
from captured import captured, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.codegen.target import export_program
from planish.decode_program import ProgramDecoder
from planish.ir.block_branches import Branch, Layer, layers_of, streams
from planish.ir.cut_blocks import BlockCut
from planish.ir.errors import CalibrationTooSmall, NonFiniteActivation, WrongOrder
from planish.ir.interpret import run
from planish.ir.program import Node, Program
from planish.ir.read_hf_folder import read_hf_folder
from planish.ir.rewrite import Journal
from planish.ir.weight_expressions import constant_nodes, sources
from planish.passes.block_influence import block_influence
from planish.passes.contract import Context
from planish.passes.cut_layers import LayerCounts, count_layers, cut_layers
from planish.passes.insert_kv_cache import InsertKvCache
from planish.passes.keep_layers import CannotCutLayers
from planish.passes.pipeline import Pipeline
from planish.recipes import pipeline
from speculation import prompt
from speculation import raised as raised_of_ids
from torch import Tensor, nn

ATEN = torch.ops.aten
# layers, attention and MLP branches of the tiny models of two layers (or two and two)
COUNTS = dict.fromkeys(zoo.ARCHITECTURES, LayerCounts(2, 2, 2)) | {
    "mamba": LayerCounts(2, 2, 0),  # its mixer is all there is of a layer
    "t5": LayerCounts(4, 6, 4),
    "bart": LayerCounts(4, 6, 4),
    "whisper": LayerCounts(4, 6, 4),
}
PRODUCTS = {
    ATEN.linear.default: (1, 2),
    ATEN.addmm.default: (0, 2),
    ATEN.bmm.default: (0, 1),
}


@functools.cache
def _raised(name: str, attention: zoo.Attention) -> Program:
    return pipeline("raise").run(captured(name, attention))


def raised(name: str, attention: zoo.Attention | None = None) -> Program:
    return _raised(name, attention or zoo.ARCHITECTURES[name].attentions[0]).copy()


def context(program: Program, *batches: list[Any]) -> Context:
    return Context(Journal(program), calibration=list(batches))


def branches(program: Program) -> list[Branch]:
    return [branch for chain in streams(program) for branch in chain]


def all_layers(program: Program) -> list[Layer]:
    return [layer for chain in streams(program) for layer in layers_of(chain)]


def without(program: Program, cut_branches: set[int], layers: set[int] = frozenset()) -> Program:  # type: ignore[assignment]
    """A copy without these branches and layers, by number."""
    made = program.copy()
    every, blocks, cut = branches(made), all_layers(made), BlockCut(made)
    for number in sorted(layers):
        cut.layer(blocks[number])
    for number in sorted(cut_branches):
        cut.branch(every[number])
    cut.sweep()
    made.graph.lint()
    return made


def silenced(program: Program, wanted: set[int]) -> Program:
    """A copy in which the last products of these branches, biases too, have weights of 0."""
    made = program.copy()
    every, constant = branches(made), constant_nodes(made)
    for number in wanted:
        for term in every[number].terms:
            for name in _last_weights(term, constant):
                made.weights[name] = torch.zeros_like(made.weights[name])
    return made


def _last_weights(term: Node, constant: set[Node]) -> set[str]:
    """Walk back to products with weights, and to biases that are added behind them."""
    found: set[str] = set()
    waiting, seen = [term], {term}
    while waiting:
        node = waiting.pop()
        weights = _weights_read(node, constant)
        found |= {str(w.target) for w in weights}
        if not weights:
            fresh = [n for n in node.all_input_nodes if n not in seen and n not in constant]
            seen.update(fresh)
            waiting.extend(fresh)
    return found


def _weights_read(node: Node, constant: set[Node]) -> set[Node]:
    if node.target is ATEN.index.Tensor and node.args[0] in constant:
        return sources(node.args[0])  # type: ignore[arg-type]
    found: set[Node] = set()
    for place in PRODUCTS.get(node.target, ()):  # type: ignore[arg-type]
        read: Any = node.args[place] if place < len(node.args) else None
        while isinstance(read, torch.fx.Node) and read not in constant:
            if node.target is not ATEN.bmm.default or read.target is not ATEN.index.Tensor:
                read = None
            else:
                read = read.args[0]
        if read is not None:
            found |= sources(read)
    return found


def results(program: Program, flat: list[Any] | None = None) -> list[Tensor]:
    given = list(program.examples) if flat is None else flat
    values = run(program, given, float64=True)
    return [value for value in values if isinstance(value, Tensor)]


def check_equal(made: Program, twin: Program) -> None:
    """In float64 x + 0 is x, and all that follows is the same operations on the same values."""
    for ours, theirs in zip(results(made), results(twin), strict=True):
        assert bool(theirs.isfinite().all())
        assert torch.equal(ours, theirs)


def size(program: Program) -> tuple[int, int]:
    return len(program.graph.nodes), program.parameter_count()


@pytest.mark.parametrize(("name", "attention"), zoo.CASES)
def test_a_cut_branch_is_one_that_gives_zero(name: str, attention: zoo.Attention) -> None:
    program = raised(name, attention)
    assert count_layers(program) == COUNTS[name]
    before, whole = size(program), results(program)
    twice = attention == "eager" and len(zoo.ARCHITECTURES[name].attentions) > 1
    for number in range(0 if twice else len(branches(program))):  # raised, both forms are one
        made = without(program, {number})
        check_equal(made, silenced(program, {number}))
        assert all(now < then for now, then in zip(size(made), before, strict=True))
        assert not torch.equal(results(made)[0], whole[0])
    every = set(range(len(branches(program))))
    check_equal(without(program, every), silenced(program, every))


@given(st.data())
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("name", ["cohere", "bart", "gemma2"])
def test_any_set_of_branches_and_layers(name: str, data: st.DataObject) -> None:
    program = raised(name)
    branch, layer = st.integers(0, len(branches(program)) - 1), st.integers(0, 1)
    gone, layers = data.draw(st.sets(branch)), data.draw(st.sets(layer))
    within = {
        number
        for number, one in enumerate(branches(program))
        if any(one in all_layers(program)[place].branches for place in layers)
    }
    made = without(program, gone - within, layers)
    if name != "bart":  # whose layers take norms along
        check_equal(made, silenced(program, gone | within))
    kept = {str(node.target) for node in made.weight_nodes()}
    assert set(made.weights) == kept
    assert size(made)[1] < size(program)[1] or not gone | layers


LAST = [name for name in zoo.ARCHITECTURES if name != "mamba"]


@pytest.mark.parametrize("name", LAST)
def test_a_cut_layer_is_the_model_without_it(name: str) -> None:
    """The model's own class, its last layer (of each stack) taken out of its list."""
    program = raised(name)
    made, model = program.copy(), zoo.build(name, zoo.ARCHITECTURES[name].attentions[0]).model
    cut = BlockCut(made)
    for chain in streams(made):
        layer = layers_of(chain)[-1]
        cut.layer(layer)
        path = layer.module.split(".")
        place = next(i for i, part in enumerate(path) if part.isdigit())
        stack = model.get_submodule(".".join(path[:place]))
        assert isinstance(stack, nn.ModuleList)
        del stack[int(path[place])]
    cut.sweep()
    inputs = sample(name, zoo.ARCHITECTURES[name].attentions[0]).other_inputs(3, 13)
    flat = made.flatten_inputs((), inputs)
    wide, native = results(made, flat)[0], run(made, flat)[0]
    with torch.no_grad():
        theirs = model(**inputs)[0]
    assert (theirs - wide).norm() <= 8 * (native - wide).norm()


class Block(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        with torch.no_grad():
            self.down.weight.mul_(scale)
            self.down.bias.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def chain(*scales: float) -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(scale) for scale in scales))
    return pipeline("raise").run(planish.trace(model, (torch.randn(3, 4, 6),)))


def test_text_before_and_after() -> None:
    program = chain(1.0, 0.01)
    assert count_layers(program) == LayerCounts(2, 0, 2)
    told = context(program, [torch.randn(3, 4, 6)])
    cut_layers(program, told, layers=1)
    body = [line.strip() for line in str(program).splitlines()]
    assert body[-6:] == [
        "%0.norm = layer_norm(%input_1, [6], %0.norm.weight, %0.norm.bias, 1e-05, False)"
        " : f32[n0, 4, 6]",
        "%0.up = linear(%0.norm, %0.up.weight, %0.up.bias) : f32[n0, 4, 10]",
        "%0.relu = relu(%0.up) : f32[n0, 4, 10]",
        "%0.down = linear(%0.relu, %0.down.weight, %0.down.bias) : f32[n0, 4, 6]",
        "%0.add = add(%input_1, %0.down) : f32[n0, 4, 6]",
        "return [%0.add]",
    ]
    assert sorted(program.weights) == [
        *(f"0.{part}.{kind}" for part in ("down", "norm", "up") for kind in ("bias", "weight"))
    ]
    (record,) = told.journal.applied_records(program)
    assert record.note.startswith("layer of 1, influence ")


def test_influence_is_one_less_the_mean_cosine() -> None:
    program = chain(1.0, 0.1, 0.5)
    batches = [torch.randn(3, 4, 6), torch.randn(1, 4, 6)]
    layers = all_layers(program)
    found = block_influence(program, layers, context(program, *([batch] for batch in batches)))
    alone = block_influence(
        program, branches(program), context(program, *([batch] for batch in batches))
    )
    wanted = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        values: dict[Node, Tensor] = {program.inputs[0]: batch}
        run(program, [batch], watch=values.__setitem__)
        for place, layer in enumerate(layers):
            pair = values[layer.enters].double(), values[layer.leaves].double()
            wanted[place] += 1 / 16 * (1 - torch.cosine_similarity(*pair, dim=-1)).sum()
    # sums of 6 products, and a mean of 16 numbers of at most 2, in float64
    eps = torch.finfo(torch.float64).eps
    assert torch.allclose(torch.tensor(found, dtype=torch.float64), wanted, rtol=0, atol=64 * eps)
    # y - f(x) is x but for the rounding of y in float32, which turns it by an angle of some eps;
    # the cosine changes by at most that
    limit = 8 * torch.finfo(torch.float32).eps
    assert torch.allclose(torch.tensor(alone, dtype=torch.float64), wanted, rtol=0, atol=limit)
    assert found[1] < found[2] < found[0]


def test_vectors_of_zeros_have_no_angle() -> None:
    program = chain(0.0)
    (found,) = block_influence(
        program, all_layers(program), context(program, [torch.zeros(3, 4, 6)])
    )
    assert found == 0.0


def test_the_least_influential_go_and_one_stays_in_each_stream() -> None:
    program = raised("t5")
    told = context(program, list(program.examples))
    cut_layers(program, told, layers=2)
    assert count_layers(program) == LayerCounts(2, 3, 2)
    assert [len(chain) for chain in streams(program)] == [2, 3]
    again = context(program, list(program.examples))
    cut_layers(program, again, attention=1)
    assert [len(chain) for chain in streams(program)] == [2, 2]
    assert "attention branch of decoder" in again.journal.applied_records(program)[0].note


def test_layers_and_branches_at_once() -> None:
    program = raised("llama")
    cut_layers(program, context(program, list(program.examples)), attention=1, mlp=1)
    left = count_layers(program)
    assert (left.attention, left.mlp) == (1, 1)
    assert run(program, list(program.examples))[0].shape == (2, 19, 97)


def test_refusals_say_what_to_do() -> None:
    program = raised("llama")
    batch = list(program.examples)
    with pytest.raises(WrongOrder, match="there are none"):
        cut_layers(program, context(program), layers=1)
    with pytest.raises(CannotCutLayers, match="2 of 2 layers cannot be cut"):
        cut_layers(program, context(program, batch), layers=2)
    with pytest.raises(CannotCutLayers, match="1 of 1 attention branches cannot be cut"):
        cut_layers(program, context(program, batch), layers=1, attention=1)
    with pytest.raises(CannotCutLayers, match="-1 of 2 mlp branches"):
        cut_layers(program, context(program, batch), mlp=-1)
    with pytest.raises(CalibrationTooSmall):
        cut_layers(program, context(program, [v[:0] for v in batch]), layers=1)
    cached = Pipeline([InsertKvCache()]).run(raised("llama"))
    with pytest.raises(CannotCutLayers, match="KV cache already"):
        cut_layers(cached, context(cached), layers=1)
    flat = planish.trace(nn.Linear(3, 5), (torch.randn(2, 3),))
    assert count_layers(flat) == LayerCounts(0, 0, 0)
    with pytest.raises(CannotCutLayers, match="0 layers cannot be cut"):
        cut_layers(flat, context(flat, list(flat.examples)), layers=1)
    assert size(program) == size(raised("llama"))


def test_numbers_that_are_not_finite_are_named() -> None:
    program = chain(1.0, 1.0)
    program.weights["0.up.weight"] = torch.full((10, 6), float("nan"))
    with pytest.raises(NonFiniteActivation, match=r"0\.up"):
        cut_layers(program, context(program, [torch.randn(3, 4, 6)]), layers=1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_folder_with_fewer_layers_loads(name: str, tmp_path: Path) -> None:
    made = zoo.build(name, "sdpa", layers=3)
    program = pipeline("raise").run(planish.trace(made.model, made.args, made.kwargs))
    cut_layers(program, context(program, list(program.examples)), layers=1)
    folder = export_program(program, tmp_path / "out", "huggingface")
    loaded = read_hf_folder(folder)
    assert loaded.config.num_hidden_layers == 2
    inputs = made.other_inputs(3, 13)
    flat = program.flatten_inputs((), inputs)
    wide, native = results(program, flat)[0], run(program, flat)[0]
    with torch.no_grad():
        theirs = loaded(**inputs)[0]
    seen = inputs["attention_mask"].bool()
    assert (theirs - wide)[seen].norm() <= 8 * (native - wide).norm()


def test_parallel_branches_that_meet_before_the_stream() -> None:
    class Falcon(nn.Module):
        """x + (mlp(n) + attention(n)), n = norm(x)."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.qkv = nn.LayerNorm(6), nn.Linear(6, 12)
            self.out, self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 10), nn.Linear(10, 6)

        def forward(self, x: Tensor) -> Tensor:
            n = self.norm(x)
            q, k, v = self.qkv(n).unsqueeze(1).split(4, -1)
            a = nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
            return x + (self.down(torch.relu(self.up(n))) + self.out(a))

    torch.manual_seed(0)
    model = nn.Sequential(Falcon(), Falcon())
    program = pipeline("raise").run(planish.trace(model, (torch.randn(3, 4, 6),)))
    assert count_layers(program) == LayerCounts(2, 2, 2)
    for gone in ({0}, {1}, {0, 1}, {1, 2}, {0, 1, 2, 3}):
        check_equal(without(program, gone), silenced(program, gone))
    check_equal(without(program, set(), {0}), silenced(program, {0, 1}))


def test_a_norm_at_the_end_of_a_layer_and_a_branch_before_all() -> None:
    class Conformer(nn.Module):
        """norm(y + mlp(y)), y = x + attention(x)."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.LayerNorm(6), nn.LayerNorm(6)
            self.qkv, self.out = nn.Linear(6, 12), nn.Linear(4, 6)
            self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.first(x)).unsqueeze(1).split(4, -1)
            a = nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
            x = x + self.out(a)
            return self.norm(x + self.down(torch.relu(self.up(self.first(x)))))

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Conv1d(6, 6, 3, padding=1)
            self.layers = nn.ModuleList(Conformer() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.places(x.transpose(1, 2)).transpose(1, 2)
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    model = Encoder().eval()
    program = pipeline("raise").run(planish.trace(model, (torch.randn(3, 4, 6),)))
    assert count_layers(program) == LayerCounts(3, 4, 3)
    made = without(program, set(), {1, 2})
    assert not any(name.startswith(("layers.1", "layers.2")) for name in made.weights)
    del model.layers[1:]
    (x,) = made.examples
    wide, native = results(made)[0], run(made, [x])[0]
    with torch.no_grad():
        assert (model(x) - wide).norm() <= 8 * (native - wide).norm()


class Sums(nn.Module):
    """Blocks x + f(x), f with products, and forms of the other term."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.scale = nn.Parameter(torch.rand(6))
        self.up = nn.ModuleList(nn.Linear(6, 10) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(10, 6) for _ in range(3))
        self.norm = nn.ModuleList(nn.LayerNorm(6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for up, down, norm in zip(self.up, self.down, self.norm, strict=True):
            y = down(torch.relu(up(x)))
            if self.form == "by channel":
                x = x * self.scale + y
            elif self.form == "scaled":
                x = norm(x * 1.5 + y)
            elif self.form == "other dtype":
                x = (x.double() + y).float()
            elif self.form == "no weights":
                x = x + x.pow(3) * 0.04
            elif self.form == "flat":
                rows = x.reshape(-1, 6)
                x = norm((rows + down(torch.relu(up(rows)))).reshape(x.shape))
        return x * 2.0


def sums(form: str) -> Program:
    torch.manual_seed(0)
    return pipeline("raise").run(planish.trace(Sums(form), (torch.randn(3, 4, 6),)))


@pytest.mark.parametrize("form", ["by channel", "other dtype", "no weights"])
def test_sums_that_are_no_residual_stream(form: str) -> None:
    assert count_layers(sums(form)) == LayerCounts(0, 0, 0)


@pytest.mark.parametrize("form", ["scaled", "flat"])
def test_post_norm_blocks(form: str) -> None:
    """A branch leaves its norm behind, a layer takes it along; views between them are no matter."""
    program = sums(form)
    assert count_layers(program) == LayerCounts(3, 0, 3)
    check_equal(without(program, {1}), silenced(program, {1}))
    assert "norm.1.weight" in without(program, {1}).weights
    made = without(program, set(), {1})
    assert sorted({name.split(".")[1] for name in made.weights}) == ["0", "2"]
    small = Sums(form).eval()
    kept = {name: made.weights[name] for name in made.weights}
    small.load_state_dict(kept, strict=False)
    for parts in (small.up, small.down, small.norm):
        del parts[1]
    (x,) = made.examples
    wide, native = results(made)[0], run(made, [x])[0]
    with torch.no_grad():
        assert (small(x) - wide).norm() <= 8 * (native - wide).norm()


@pytest.mark.parametrize("what", [{"layers": 1}, {"attention": 1}])
def test_a_cache_is_inserted_for_what_stays(what: dict[str, int]) -> None:
    program = raised_of_ids("llama", layers=3).copy()
    ids = torch.tensor([prompt(9)])
    cut_layers(program, context(program, [ids]), **what)
    cached = Pipeline([InsertKvCache()]).run(program)
    assert len(cached.metadata["cache"]["layers"]) == 2
    decoder = ProgramDecoder(cached)
    rows = torch.cat([decoder.advance(list(prompt(9))[i : i + 3]) for i in (0, 3, 6)])
    wide, native = results(program, [ids])[0][0], run(program, [ids])[0][0]
    assert (rows - wide).norm() <= 8 * (native - wide).norm()


def test_an_adapter_belongs_to_its_branch() -> None:
    class Adapted(nn.Module):
        """x + (f(x) + up(relu(down(f(x)))))."""

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
            self.narrow, self.wide = nn.Linear(6, 2), nn.Linear(2, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.down(torch.relu(self.up(x)))
            return x + (y + self.wide(torch.relu(self.narrow(y))))

    torch.manual_seed(0)
    model = nn.Sequential(Adapted(), Adapted(), Adapted())
    program = pipeline("raise").run(planish.trace(model, (torch.randn(3, 4, 6),)))
    assert count_layers(program) == LayerCounts(3, 0, 3)
    made = without(program, {1})
    assert not any(name.startswith("1.") for name in made.weights)
