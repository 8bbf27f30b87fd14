"""`planish export --kv-cache` and `planish generate`: what they write, print and refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_decoders as tiny
from planish import cli
from planish.cli_generate import rounding_note
from planish.generator import Generator
from typer.testing import CliRunner, Result


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("decoders")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(base: Path) -> Path:
    """What the command line exports from a model folder."""
    out = base / "out"
    ended = call("export", tiny.source(base), "--kv-cache", "--recipe", "exact", "--out", out)
    assert ended.exit_code == 0, ended.stderr
    return out


@pytest.fixture(scope="module")
def bare(folder: Path) -> Path:
    """The same without a tokenizer."""
    copy = shutil.copytree(folder, folder.with_name("bare"))
    for file in copy.glob("tokenizer*"):
        file.unlink()
    return copy


def said(ended: Result) -> str:
    """Its output to the byte: `stdout` takes carriage returns away."""
    assert ended.exit_code == 0, ended.stderr
    return ended.stdout_bytes.decode("utf-8")


def test_from_a_model_folder_to_text(folder: Path, tmp_path: Path) -> None:
    files = {file.name for file in folder.iterdir()}
    assert files == {
        "model.onnx",
        "model.onnx.data",
        "planish.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "genai_config.json",
    }
    told = tmp_path / "told.json"
    ended = call("generate", folder, "then the", "--max-new-tokens", 12, "--json", told)
    ids = tiny.tokenizer()("then the")["input_ids"]
    wanted = tiny.greedy(ids, 12)
    assert said(ended) == tiny.tokenizer().decode(wanted, skip_special_tokens=True) + "\n"
    assert f"{len(ids)} prompt tokens, " in ended.stderr and "12 new tokens, " in ended.stderr
    assert "tokens/s; stopped by: --max-new-tokens" in ended.stderr
    result = json.loads(told.read_text())
    assert result["ids"] == wanted and result["stopped_by"] == "length"


def test_its_options_are_those_of_the_generator(folder: Path) -> None:
    options = {
        "max_new_tokens": 40,
        "temperature": 1.2,
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "seed": 5,
    }
    wanted = Generator(folder, threads=1).generate("the", **options)  # pyright: ignore
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    assert said(call("generate", folder, "the", *flags, "--threads", 1)) == wanted.text + "\n"
    stop = next(text for text in wanted.text if not text.isspace() and text != "\ufffd")
    cut = call("generate", folder, "the", *flags, "--stop", "never", "--stop", stop)
    assert said(cut) == wanted.text[: wanted.text.index(stop)] + "\n"
    assert "stopped by: a stop string" in cut.stderr


def test_a_conversation_and_token_ids(folder: Path) -> None:
    generator = Generator(folder, threads=1)
    asked = generator.chat_ids([{"role": "user", "content": "the end"}])
    wanted = generator.generate(asked, max_new_tokens=9)
    ended = call("generate", folder, "the end", "--chat", "--max-new-tokens", 9)
    assert said(ended) == wanted.text + "\n"
    assert f"{len(asked)} prompt tokens" in ended.stderr
    ended = call("generate", folder, "17, 45 99", "--ids", "--max-new-tokens", 9)
    assert [int(word) for word in said(ended).split()] == tiny.greedy([17, 45, 99], 9)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nothing-here", "the"], "SourceNotFound: there is no folder nothing-here"),
        (["FOLDER", "1 x", "--ids"], "WrongInput: the prompt is not a list of token ids"),
        (["FOLDER", "7 99999", "--ids"], "WrongInput: token id 99999 is not in the model's"),
        (["FOLDER", "x" * 500], "TextTooLong: the text does not fit into the model's context"),
        (["FOLDER", "the", "--top-p", "2"], "WrongOption: top_p cannot be 2.0"),
        (["BARE", "the"], "WrongInput: a prompt of text needs a tokenizer"),
        (["BARE", "the", "--chat"], "WrongInput: a conversation needs a tokenizer"),
        (["SOURCE", "the"], "was not exported by planish"),
    ],
)
def test_refusals(
    base: Path, folder: Path, bare: Path, arguments: list[str], sentence: str
) -> None:
    names = {"FOLDER": folder, "BARE": bare, "SOURCE": tiny.source(base)}
    ended = call("generate", *(names.get(word, word) for word in arguments))
    assert ended.exit_code == 2
    assert sentence in ended.stderr and "what to do: " in ended.stderr
    assert ended.stdout == ""


def test_what_cannot_be_written_is_named_before_anything_runs(folder: Path, tmp_path: Path) -> None:
    ended = call("generate", folder, "the", "--json", tmp_path / "no" / "x.json")
    assert ended.exit_code == 2 and "OutputNotWritable" in ended.stderr and ended.stdout == ""


def test_drafts_on_rounded_activations_are_warned_of(tmp_path: Path) -> None:
    for activations, warned in (("int8", True), ("float", False)):
        told = {"target_options": {"activations": activations}}
        (tmp_path / "planish.json").write_text(json.dumps(told))
        assert (rounding_note(tmp_path) is not None) == warned
