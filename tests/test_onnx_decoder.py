"""Cached decoders in ONNX: equal call by call, on growing and on shared buffers, and described."""

from __future__ import annotations

import functools
from pathlib import Path

import onnx
import pytest
import zoo
from onnx_checks import domains, exported, graph_of, op_counts
from onnx_decoders import WIDE, SharedBuffers, assert_calls_agree, decoder, section, tokens
from planish.codegen.onnx_builder import Options
from planish.codegen.onnx_lower import lower
from planish.ir.interpret import run
from planish.ir.numerics import relative_error
from planish.passes.insert_kv_cache import empty_past
from planish.passes.keep_last_logits import KeepLastLogits
from planish.passes.pipeline import Pipeline

CASES = [
    *((name, True) for name in WIDE),
    *((name, False) for name in ("gpt2", "gemma", "opt", "bloom", "phi3", "deepseek_v3")),
]
SHARED = {(name, False) for name in ("gpt2", "phi3", "opt", "bloom")} | {(n, True) for n in WIDE}
ALSO_STANDARD = ("llama", "gemma2", "gpt_oss", "gpt2", "bloom", "deepseek_v3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> object:
    @functools.cache
    def made(name: str, wide: bool, profile: str) -> Path:
        out = tmp_path_factory.mktemp("decoder") / "out"
        return exported(decoder(name, wide), out, profile=profile)

    return made


@pytest.mark.parametrize(
    ("name", "wide", "profile"),
    [
        *((name, wide, "ort") for name, wide in CASES),
        *((name, wide, "standard") for name, wide in CASES if name in ALSO_STANDARD),
    ],
)
def test_a_decoder_equals_its_program_call_by_call(
    name: str, wide: bool, profile: str, folders: object
) -> None:
    program, folder = decoder(name, wide), folders(name, wide, profile)  # type: ignore[operator]
    shared = profile == "ort" and (name, wide) in SHARED
    assert section(folder)["cache"] == ("shared" if shared else "growing")
    assert profile == "ort" or domains(folder) == {""}
    assert_calls_agree(program, folder, tokens(1, 17), [9, 12, 13, 14, 15, 16])
    assert_calls_agree(program, folder, tokens(3, 13, seed=1), [10, 11, 12])


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "cohere", "gpt2", "bloom"])
def test_past_and_present_may_be_one_buffer(name: str, folders: object) -> None:
    wide = name in WIDE
    program, folder = decoder(name, wide), folders(name, wide, "ort")  # type: ignore[operator]
    for batch, cuts in ((1, [8, 11, 12, 13]), (3, [11, 12, 13])):
        ids = tokens(batch, 14, seed=2)
        buffers, past = SharedBuffers(folder, batch, context=40), empty_past(program, batch)
        for start, end in zip([0, *cuts], [*cuts, 14], strict=True):
            wanted, *past = run(program, [ids[:, start:end], *past])
            # Two float32 runs of the same sums; the call-by-call test bounds both by float64.
            assert relative_error(wanted, buffers(ids[:, start:end])) < 1e-5


def test_a_buffer_that_is_full_is_told_by_the_runtime(folders: object) -> None:
    buffers = SharedBuffers(folders("llama", True, "ort"), 1, context=8)  # type: ignore[operator]
    buffers(tokens(1, 8))
    with pytest.raises(Exception, match=r"\{1,2,8,16\} but the computed output shape"):
        buffers(tokens(1, 1))


def test_the_manifest_describes_the_cache(folders: object) -> None:
    shared = section(folders("llama", True, "ort"))  # type: ignore[operator]
    assert shared == {
        "cache": "shared",
        "layers": 2,
        "shapes": [[2, 16, 16]] * 2,
        "dtype": "float32",
        "mask": "attention_mask",
        "context": 8192,
        "vocabulary": zoo.VOCABULARY,
        "logits": "all",
    }
    growing = section(folders("deepseek_v3", False, "standard"))  # type: ignore[operator]
    told = {key: growing[key] for key in ("cache", "shapes", "mask", "context")}
    assert told == {"cache": "growing", "shapes": [[6, 16, 12]] * 2, "mask": None, "context": None}


def test_kept_logits_are_told(tmp_path: Path) -> None:
    program = Pipeline([KeepLastLogits(3)]).run(decoder("llama", True))
    folder = exported(program, tmp_path / "out")
    assert section(folder)["logits"] == 3
    assert_calls_agree(program, folder, tokens(1, 9), [6, 8])


def test_inputs_and_outputs_have_the_usual_names(folders: object) -> None:
    graph = graph_of(folders("llama", True, "ort"))  # type: ignore[operator]
    layers = [f"{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    past = [f"past_key_values.{name}" for name in layers]
    assert [value.name for value in graph.input] == ["input_ids", "attention_mask", *past]
    assert [value.name for value in graph.output] == ["logits", *(f"present.{n}" for n in layers)]
    axes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output]
    }
    assert axes["attention_mask"] == ["batch", "total"]
    assert axes["past_key_values.1.value"] == ["batch", 2, "past", 16]
    assert axes["present.1.value"] == ["batch", 2, "present", 16]
    standard = graph_of(folders("llama", True, "standard"))  # type: ignore[operator]
    assert [value.name for value in standard.input] == ["input_ids", *past]


def test_a_layer_is_few_nodes(folders: object) -> None:
    counts = op_counts(folders("llama", True, "ort"))  # type: ignore[operator]
    once = {"Shape": 1, "ReduceSum": 1, "Sub": 1, "Cast": 2, "Gather": 1, "RMSNormalization": 1}
    layer = {
        "SkipSimplifiedLayerNormalization": 2,
        "MatMul": 4,
        "GroupQueryAttention": 1,
        "Split": 1,
        "QuickGelu": 1,
        "Mul": 1,
    }
    twice = {name: 2 * count for name, count in layer.items()}
    twice["MatMul"] += 1  # the output
    assert dict(counts) == {**once, **twice}
    standard = op_counts(folders("llama", True, "standard"))  # type: ignore[operator]
    kept = {name: standard[name] for name in ("Attention", "RotaryEmbedding", "Transpose", "Range")}
    assert kept == {"Attention": 2, "RotaryEmbedding": 4, "Transpose": 0, "Range": 1}


def test_rotary_tables_are_stored_once(folders: object) -> None:
    graph = graph_of(folders("cohere", True, "ort"))  # type: ignore[operator]
    tables = [t for t in graph.initializer if t.name.startswith("rotary.")]
    assert {t.name: list(t.dims) for t in tables} == {
        "rotary.cos": [8192, 16],
        "rotary.sin": [8192, 16],
    }
    node = next(node for node in graph.node if node.op_type == "GroupQueryAttention")
    told = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert (told["do_rotary"], told["rotary_interleaved"]) == (1, 1)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("llama", "has heads of 10 channels, not a multiple of 8"),
        ("deepseek_v3", "has keys of 16 and values of 12 channels a head"),
    ],
)
def test_why_a_cache_grows_is_one_sentence(name: str, sentence: str) -> None:
    lowered = lower(decoder(name), Options("ort"))
    assert len(lowered.notes) == 1 and sentence in lowered.notes[0]


def test_why_a_rotation_stays_apart_is_told() -> None:
    lowered = lower(decoder("phi3"), Options("ort"))
    assert lowered.decoder is not None and lowered.decoder.shared
    assert "turns 8 of 8 channels a head only in multiples of 16" in lowered.notes[0]


@pytest.mark.parametrize("profile", ["ort", "standard"])
@pytest.mark.parametrize(("name", "wide"), [("gemma2", True), ("cohere", True), ("gpt2", False)])
def test_lowering_keeps_the_meaning(name: str, wide: bool, profile: str) -> None:
    """The lowered program runs on the interpreter, and the given one stays as it was."""
    program = decoder(name, wide)
    before = str(program)
    lowered = lower(program, Options(profile)).program
    assert str(program) == before != str(lowered)
    ids = tokens(2, 9)
    past, theirs = empty_past(program, 2), empty_past(program, 2)
    for piece in (ids[:, :5], ids[:, 5:6], ids[:, 6:]):
        wanted = run(program, [piece, *past], float64=True)
        found = run(lowered, [piece, *theirs], float64=True)
        for ours, right in zip(found, wanted, strict=True):
            # The tables of the lowered program were made in float32.
            assert relative_error(right, ours) < 1e-6
        past, theirs = wanted[1:], found[1:]
