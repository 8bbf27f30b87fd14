"""keep_layers: the first layers alone are the smaller model with the same weights."""

from __future__ import annotations

import pytest
import torch
import zoo
from captured import captured
from planish.decode_program import ProgramDecoder
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.ir.text import value_names
from planish.passes.insert_kv_cache import InsertKvCache
from planish.passes.keep_layers import CannotCutLayers, KeepLayers, layer_ends
from planish.passes.pipeline import Pipeline
from planish.recipes import pipeline
from speculation import prompt, raised
from torch import nn

ATTENTION = torch.ops.planish.attention.default
MODELS: list[tuple[str, zoo.Attention]] = [
    ("llama", "sdpa"),
    ("gpt2", "sdpa"),
    ("cohere", "sdpa"),  # attention and MLP side by side after one norm
    ("gemma2", "eager"),  # norms after the blocks too
    ("mixtral", "sdpa"),  # experts
]


def two_of(name: str, attention: zoo.Attention) -> nn.Module:
    """The model of two layers with the weights of the first two of three."""
    big, small = zoo.build(name, attention, layers=3), zoo.build(name, attention, layers=2)
    known = small.model.state_dict()
    small.model.load_state_dict({k: v for k, v in big.model.state_dict().items() if k in known})
    return small.model


@pytest.mark.parametrize(("name", "attention"), MODELS)
def test_it_is_the_model_with_fewer_layers(name: str, attention: zoo.Attention) -> None:
    whole = raised(name, attention, 3)
    cut = Pipeline([KeepLayers(2)], verify="numbers", on_break="raise").run(whole)
    ids = torch.tensor([prompt(17), prompt(17, 1)])
    with torch.no_grad():
        wanted = two_of(name, attention)(input_ids=ids).logits
    wide = run(cut, [ids], float64=True)[0]
    gap = (run(cut, [ids])[0] - wide).norm() / wide.norm()
    assert (wanted - wide).norm() / wide.norm() <= 4 * gap
    assert sum(node.target is ATTENTION for node in cut.graph.nodes) == 2


def test_it_shares_its_weights_with_the_whole() -> None:
    whole = raised("llama", layers=3)
    cut = Pipeline([KeepLayers(1)]).run(whole)
    assert 0 < len(cut.weights) < len(whole.weights)
    assert all(cut.weights.entry(name) is whole.weights.entry(name) for name in cut.weights)
    assert not any("layers.1" in name or "layers.2" in name for name in cut.weights)


@pytest.mark.parametrize("count", [1, 2])
def test_before_or_after_the_cache_is_inserted(count: int) -> None:
    whole = raised("llama", layers=3)
    first = Pipeline([KeepLayers(count), InsertKvCache()]).run(whole)
    last = Pipeline([InsertKvCache(), KeepLayers(count)]).run(whole)
    assert [node.name for node in last.inputs] == [node.name for node in first.inputs]
    assert (last.in_spec, last.out_spec) == (first.in_spec, first.out_spec)
    ids = list(prompt(9))
    decoders = ProgramDecoder(first), ProgramDecoder(last)
    for piece in (ids[:5], ids[5:6], ids[6:]):
        rows = [decoder.advance(piece) for decoder in decoders]
        assert torch.equal(*rows)
    assert len(run(last, list(last.examples))) == len(last.results) == 1 + 2 * count
    assert len(last.metadata["cache"]["layers"]) == count


def test_where_layers_end() -> None:
    def ends(program: Program) -> list[str]:
        attentions = [node for node in program.graph.nodes if node.target is ATTENTION]
        names = value_names(program.graph)
        return [names[node] for node in layer_ends(program, attentions)]

    assert ends(raised("llama", layers=3)) == [
        "model.embed_tokens",
        "model.layers.0.add_1",
        "model.layers.1.add_1",
        "model.layers.2.add_1",
    ]
    assert ends(raised("gpt2"))[0] == "transformer.add"  # tokens and positions


def test_refusals_are_one_sentence() -> None:
    def refusal(program: Program, count: int) -> str:
        with pytest.raises(CannotCutLayers) as caught:
            Pipeline([KeepLayers(count)]).run(program)
        return caught.value.what

    assert refusal(raised("llama"), 2) == "2 layers cannot be kept of 2"
    assert refusal(raised("llama"), 0) == "0 layers cannot be kept of 2"
    crossed = pipeline("raise").run(captured("t5", "sdpa"))
    assert "cannot be told apart: no single value leads from the layer before" in refusal(
        crossed, 1
    )
