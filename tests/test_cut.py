"""Cutting channels: what is left equals the program with those weights set to 0, and is smaller."""

from __future__ import annotations

from pathlib import Path

import planish
import pytest
import torch
import zoo
from cut_checks import check, every_third, raised, sizes
from planish.codegen.run_onnx import OnnxModel
from planish.ir.channel_map import channel_map
from planish.ir.cut_channels import CannotCut, cut_channels
from planish.ir.errors import WrongOption, WrongOrder
from planish.ir.find_units import find_units
from planish.ir.interpret import run
from planish.ir.prunable_units import Kind
from planish.ir.read_hf_folder import read_hf_folder
from planish.passes.cut import Cut
from planish.passes.pipeline import Pipeline
from planish.recipes import pipeline

# units of each kind in each place (two layers; t5, bart, whisper: encoder and decoder)
KINDS: tuple[Kind, ...] = ("ffn", "heads", "queries", "width")
_GQA = {"ffn": [80, 80], "heads": [2, 2], "queries": [3, 3], "width": [48]}
_MHA = {"ffn": [80, 80], "heads": [6, 6], "queries": [], "width": [48]}
_CROSSED = {"heads": [6] * 6, "queries": [], "width": []}  # as two layers attend twice
COUNTS: dict[str, dict[Kind, list[int]]] = {
    **dict.fromkeys(("llama", "qwen2", "gemma2", "mistral", "phi3", "cohere"), _GQA),
    **dict.fromkeys(("gpt_oss", "mixtral"), _GQA),
    **dict.fromkeys(("gpt2", "opt"), _MHA),
    **dict.fromkeys(("bert", "distilbert", "vit"), _MHA | {"width": []}),  # returns its stream
    "gemma": _GQA | {"heads": [6, 6], "queries": [6, 6]},  # one key head: its query heads
    "bloom": _MHA | {"ffn": [192, 192]},
    "deepseek_v3": _MHA | {"ffn": [80, 28, 28]},  # routed and shared experts in the second layer
    "mamba": {"ffn": [96, 96], "heads": [], "queries": [], "width": [48]},  # inner channels
    "t5": _CROSSED | {"ffn": [80] * 4},  # the encoder's stream, tied to the decoder's, is returned
    "bart": _CROSSED | {"ffn": [80, 80, 56, 56]},
    # between the convolutions too; the stream of the decoder is returned by nothing
    "whisper": _CROSSED | {"ffn": [48, 80, 80, 56, 56], "width": [48]},
}


QUICK = ("llama", "gemma", "cohere", "bloom", "t5", "bert")  # the others take a capture each


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        pytest.param(
            name,
            attention,
            marks=() if name in QUICK and attention == form.attentions[0] else pytest.mark.slow,
        )
        for name, form in zoo.ARCHITECTURES.items()
        for attention in form.attentions
    ],
)
def test_a_cut_equals_the_masked_program(name: str, attention: zoo.Attention) -> None:
    program = raised(name, attention)
    channels = channel_map(program)
    for kind in KINDS:
        units = find_units(program, channels, [kind])
        assert sizes(units) == COUNTS[name][kind], kind
        if units:
            check(program, channels, every_third(units))


def test_the_example_of_the_recipe() -> None:
    sample = zoo.build("llama", "sdpa")
    batches = [sample.other_inputs(3, 13, seed) for seed in range(4)]
    made = planish.optimize(
        sample.model,
        sample.args,
        sample.kwargs,
        recipe="cut",
        calibration=batches,
        options={"cut.ffn": 0.25, "cut.heads": 0.5, "cut.importance": "wanda"},
        verify="numbers",
    )
    shapes = {name: tuple(made.program.weights.shape(name)) for name in made.program.weights}
    assert shapes["model.layers.1.mlp.down_proj.weight"] == (48, 60)
    assert shapes["model.layers.1.self_attn.o_proj.weight"] == (48, 30)
    flat = made.program.flatten_inputs((), sample.other_inputs(3, 13))
    wide = run(made.program, flat, float64=True)[0]
    own = (run(made.program, flat)[0] - wide).norm()
    with torch.no_grad():
        assert (made(**sample.other_inputs(3, 13))["logits"] - wide).norm() <= 8 * own


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "phi3"))]
)
def test_targets_take_what_was_cut(name: str, tmp_path: Path) -> None:
    sample = zoo.build(name, "sdpa")
    # gpt2's and phi3's classes divide their width by the heads, so a folder cannot say another one
    options = {"cut.ffn": 0.25} | ({"cut.width": 0.25} if name == "llama" else {})
    made = planish.optimize(sample.model, sample.args, sample.kwargs, recipe="cut", options=options)
    flat = made.program.flatten_inputs((), sample.other_inputs(3, 13))
    wide = run(made.program, flat, float64=True)[0]
    own = (run(made.program, flat)[0] - wide).norm()
    model = OnnxModel(made.export(tmp_path / "onnx"))
    assert (model(**sample.other_inputs(3, 13))["logits"] - wide).norm() <= 8 * own
    loaded = read_hf_folder(made.export(tmp_path / "folder", target="huggingface"))
    count = sum(p.numel() for p in {id(p): p for p in loaded.parameters()}.values())
    assert count < sum(p.numel() for p in {id(p): p for p in sample.model.parameters()}.values())
    with torch.no_grad():
        theirs = loaded(**sample.other_inputs(3, 13))[0]
    seen = sample.other_inputs(3, 13)["attention_mask"].bool()
    assert (theirs - wide)[seen].norm() <= 8 * own


def test_a_cut_of_nothing_is_refused() -> None:
    with pytest.raises(WrongOption, match="not told what to cut"):
        Pipeline([Cut()]).run(raised("llama"))


def test_a_share_that_is_less_than_one_unit_says_so() -> None:
    made = Pipeline([Cut(heads=0.1)]).run(raised("llama"))
    told = [declined.reason for declined in made.history.records[-1].declined]
    assert len(told) == 2 and "0.1 of 2 heads of" in told[0]


def test_text_before_and_after() -> None:
    class Mlp(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(3, 8), torch.nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = self.up(x).reshape(x.shape[0], 4, 2)
            return self.down(torch.relu(wide).reshape(x.shape[0], 8))

    torch.manual_seed(0)
    program = pipeline("raise").run(planish.trace(Mlp(), (torch.randn(2, 3),)))
    channels = channel_map(program)
    up = channels.axes["up.weight", 0]
    made = cut_channels(program.copy(), {int(up[2]), int(up[3])}, channels=channels)
    body = [line.strip() for line in str(made).splitlines() if "=" in line]
    assert [
        line for line in body if line.startswith(("%up =", "%view", "%reshape", "%down ="))
    ] == [
        "%up = linear(%x, %up.weight, %up.bias) : f32[n0, 6]",
        "%reshape = reshape(%up, [%sym_size, 3, 2]) : f32[n0, 3, 2]",
        "%reshape_1 = reshape(%relu, [%sym_size, 6]) : f32[n0, 6]",
        "%down = linear(%reshape_1, %down.weight, %down.bias) : f32[n0, 5]",
    ]
    with pytest.raises(CannotCut, match="different numbers"):
        cut_channels(program.copy(), {int(up[2])}, channels=channels)


def test_what_the_program_returns_stays() -> None:
    program = raised("bert").copy()
    channels = channel_map(program)
    dead = {int(channels.axes["embeddings.word_embeddings.weight", 1][0])}
    before = str(program)
    with pytest.raises(CannotCut, match="returned by the program"):
        cut_channels(program, dead, channels=channels)
    assert str(program) == before


@pytest.mark.parametrize("share", [1.0, -0.1])
def test_shares_that_leave_nothing_are_refused(share: float) -> None:
    with pytest.raises(WrongOption, match=r"cut\.ffn"):
        Cut(ffn=share)


def test_reconstruction_needs_batches() -> None:
    with pytest.raises(WrongOrder, match="needs calibration batches"):
        Pipeline([Cut(ffn=0.25, reconstruct=True)]).run(raised("llama"))


def test_reconstruction_brings_outputs_nearer() -> None:
    program = raised("llama")
    sample = zoo.build("llama", "sdpa")
    batches = [list(program.flatten_inputs((), sample.other_inputs(4, 17, s))) for s in range(12)]
    held = program.flatten_inputs((), sample.other_inputs(4, 17, 99))
    wanted = run(program, held)[0]
    errors = []
    for reconstruct in (False, True):
        step = Cut(ffn=0.25, reconstruct=reconstruct)
        made = Pipeline([step]).run(program, calibration=batches)
        errors.append(float((run(made, held)[0] - wanted).norm()))
    assert errors[1] < errors[0]


def test_multiples_are_kept() -> None:
    made = Pipeline([Cut(ffn=0.3, multiple=16)]).run(raised("llama"))
    assert made.weights.shape("model.layers.0.mlp.up_proj.weight") == (64, 48)
