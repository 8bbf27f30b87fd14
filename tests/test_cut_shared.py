"""Cutting what shares channels: query heads on one key head, slopes, a bias of several attentions,
tables narrower than the stream; and the streams of encoders that return something else."""

from __future__ import annotations

from typing import Any

import planish
import pytest
import torch
import transformers
import zoo
from cut_checks import check, doubled, every_third, gap, raised, sizes
from planish.ir.capture import capture_module
from planish.ir.channel_map import channel_map
from planish.ir.cut_channels import CannotCut, cut_channels, masked
from planish.ir.find_units import find_units
from planish.ir.program import Program
from planish.recipes import pipeline
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Attention(nn.Module):
    """4 heads of 3 channels, values of 5."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(7, 12, bias=False), nn.Linear(7, 12, bias=False)
        self.v, self.o = nn.Linear(7, 20, bias=False), nn.Linear(20, 7, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            part(x).reshape(*x.shape[:2], 4, -1).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        y = scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.o(y.transpose(1, 2).reshape(*x.shape[:2], 20))


class Biased(nn.Module):
    """Two attentions read one learned bias (as in T5), a third has slopes (as in BLOOM)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4)
        self.first, self.second, self.third = Attention(), Attention(), Attention()

    def forward(self, x: Tensor) -> Tensor:
        apart = torch.arange(6)[:, None] - torch.arange(6)
        bias = self.table(apart + 5).permute(2, 0, 1).unsqueeze(0)
        slopes = torch.pow(0.5, torch.arange(1, 5)).reshape(4, 1, 1)
        x = x + self.first(x, bias)
        x = x + self.second(x, bias)
        return x + self.third(x, -slopes * apart.abs())


@pytest.fixture(scope="module")
def biased() -> Program:
    torch.manual_seed(0)
    model = Biased().eval()
    with torch.no_grad():
        model.table.weight.normal_()
    return pipeline("raise").run(planish.trace(model, (torch.randn(2, 6, 7),)))


def lines(program: Program, *parts: str) -> list[str]:
    text = [line.strip() for line in str(program).splitlines()]
    return [line for line in text if any(part in line.partition("=")[0] for part in parts)]


def dead_heads(program: Program, *heads: tuple[int, ...]) -> set[int]:
    """Roots of these heads of each attention."""
    units = find_units(program, channel_map(program), ["heads"])
    chosen = [4 * layer + head for layer, places in enumerate(heads) for head in places]
    return {root for place in chosen for root in units[place].roots}


def test_each_attention_reads_its_heads_of_a_bias(biased: Program) -> None:
    """The first keeps heads 0, 2, 3, the second 0, 1; so the table keeps all four."""
    dead = dead_heads(biased, (1,), (2, 3), (0, 2))
    check(biased, channel_map(biased), dead)
    made = cut_channels(biased.copy(), dead)
    assert made.weights.shape("table.weight") == (11, 4)
    assert made.weights.shape("second.o.weight") == (7, 10)
    assert [line.partition(", scale")[0] for line in lines(made, "index_select", "attention")] == [
        "%first.index_select = index_select(%unsqueeze_1, 1, %kept_places) : f32[1, 3, 6, 6]",
        "%first.attention = attention(%first.transpose, %first.transpose_1, %first.transpose_2, "
        "%first.index_select",
        "%second.index_select = index_select(%unsqueeze_1, 1, %kept_places_2) : f32[1, 2, 6, 6]",
        "%second.attention = attention(%second.transpose, %second.transpose_1, "
        "%second.transpose_2, %second.index_select",
        "%third.index_select = index_select(%mul, 0, %kept_places_3) : f32[2, 6, 6]",
        "%third.attention = attention(%third.transpose, %third.transpose_1, %third.transpose_2, "
        "%third.index_select",
    ]
    kept = [made.weights[f"kept_places{part}"].tolist() for part in ("", "_2", "_3")]
    assert kept == [[0, 2, 3], [0, 1], [1, 3]]


def test_a_column_of_a_table_goes_with_its_last_reader(biased: Program) -> None:
    dead = dead_heads(biased, (1, 3), (1, 2))
    check(biased, channel_map(biased), dead)
    made = cut_channels(biased.copy(), dead)
    assert made.weights.shape("table.weight") == (11, 3)
    assert channel_map(biased).closure(dead) == dead | {
        int(channel_map(biased).axes["table.weight", 1][1])
    }


def test_cut_again(biased: Program) -> None:
    """What was cut can be cut, chosen places and all."""
    made = cut_channels(doubled(biased), dead_heads(biased, (1,), (2,), (0,)))
    units = find_units(made, channel_map(made), ["heads"])
    assert sizes(units) == [3, 3, 3]
    dead = {root for place in (0, 4, 8) for root in units[place].roots}  # head 0; 1; 3 (a slice)
    check(made, channel_map(made), dead)
    again = cut_channels(made.copy(), dead)
    kept = [again.weights[name].tolist() for name in again.weights if "kept_places" in name]
    assert kept == [[1, 2], [0, 2]] and again.weights.shape("table.weight") == (11, 3)


class HeadsInBatch(nn.Module):
    """Stored slopes, of which the heads are folded into the batch and unfolded again."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.125, 0.0625]))
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        places = x[:, :, 0].cumsum(1)[:, None, :]
        folded = (self.slopes[:, None] * places).reshape(x.shape[0] * 4, 1, x.shape[1])
        return self.attention(x, folded.tanh().reshape(x.shape[0], 4, 1, x.shape[1]))


def test_heads_folded_into_the_batch() -> None:
    torch.manual_seed(0)
    program = pipeline("raise").run(planish.trace(HeadsInBatch().eval(), (torch.randn(2, 6, 7),)))
    dead = dead_heads(program, (0, 2))
    check(program, channel_map(program), dead)
    made = cut_channels(program.copy(), dead)
    assert made.weights.shape("slopes") == (2,)
    assert lines(made, "%reshape")[0] == "%reshape = reshape(%mul, [-1, 1, 6]) : f32[2*n0, 1, 6]"


def test_key_heads_keep_as_many_query_heads() -> None:
    program = raised("llama")
    channels = channel_map(program)
    heads = channels.attentions[0]
    for gone, fine in (((0, 1), False), ((0, 4), True), ((0, 1, 2), True), ((0,), False)):
        dead = {int(root) for query in gone for root in heads.query[query]}
        if fine:
            check(program, channels, set(channels.closure(dead)))
        else:
            with pytest.raises(CannotCut, match="different numbers of queries"):
                cut_channels(program.copy(), dead)
    dead = {int(root) for query in (0, 1, 2) for root in heads.query[query]}
    assert {int(root) for root in heads.key[0]} <= channels.closure(dead)  # nobody reads it


def test_shared_norms_stay_while_one_head_is_left() -> None:
    """Cohere's norms of queries have a row for each head, whose rows go with them."""
    program = raised("cohere")
    units = find_units(program, channel_map(program), ["queries"])
    made = cut_channels(program.copy(), units[0].roots)
    assert made.weights.shape("model.layers.0.self_attn.q_norm.weight") == (4, 8)
    assert made.weights.shape("model.layers.0.self_attn.k_norm.weight") == (2, 8)


class Only(nn.Module):
    """One of a model's results."""

    def __init__(self, model: nn.Module, result: str) -> None:
        super().__init__()
        self.model, self.result = model, result

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.model(**inputs)[self.result]


@pytest.mark.parametrize(
    ("name", "result", "streams"),
    [
        ("t5", "logits", [48]),  # tied by one table
        pytest.param("bart", "logits", [48], marks=pytest.mark.slow),
        pytest.param("whisper", "logits", [48, 48], marks=pytest.mark.slow),
        ("bert", "pooler_output", [48]),
        pytest.param("vit", "pooler_output", [48], marks=pytest.mark.slow),
    ],
)
def test_width_goes_where_nothing_returns_the_stream(
    name: str, result: str, streams: list[int]
) -> None:
    sample = zoo.build(name, "sdpa")
    model = Only(sample.model, result)
    program = pipeline("raise").run(capture_module(model, sample.args, sample.kwargs))
    channels = channel_map(program)
    units = find_units(program, channels, ["width"])
    assert sizes(units) == streams
    check(program, channels, every_third(units))


_NARROW: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "attn_implementation": "sdpa",
}


@pytest.mark.parametrize("name", ["opt", "albert"])
def test_tables_narrower_than_the_stream(name: str) -> None:
    """20 channels, widened to 48 (and back for OPT's tied head); ALBERT's layers share weights."""
    torch.manual_seed(0)
    ids = torch.randint(2, 96, (3, 13))
    if name == "opt":
        sizes_of = transformers.OPTConfig(**_NARROW, ffn_dim=80, word_embed_proj_dim=20)
        model = transformers.AutoModelForCausalLM.from_config(sizes_of)
    else:
        sizes_of = transformers.AlbertConfig(**_NARROW, intermediate_size=80, embedding_size=20)
        model = transformers.AutoModel.from_config(sizes_of)
    model = model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    program = pipeline("raise").run(capture_module(model, (), inputs))
    channels = channel_map(program)
    for kind, counts in (
        ("embedding", [20]),
        ("width", [48] if name == "opt" else []),
        ("heads", [6, 6] if name == "opt" else [6]),
    ):
        units = find_units(program, channels, [kind])  # type: ignore[list-item]
        assert sizes(units) == counts, kind
        if units:
            check(program, channels, every_third(units))


def test_masked_is_the_twin_of_a_cut_of_all_readers(biased: Program) -> None:
    """A bias of heads that are gone has no say: whatever its column holds, the result is one."""
    dead = dead_heads(biased, (1,), (1,))
    other = doubled(biased)
    other.weights["table.weight"] = (
        other.weights["table.weight"].clone().index_fill_(1, torch.tensor([1]), 3.0)
    )
    twins = [masked(program, channel_map(biased), dead) for program in (doubled(biased), other)]
    assert gap(*twins) <= 4096 * torch.finfo(torch.float64).eps
