"""Calibration inputs: slices of a text with the model's own special tokens, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from planish import optimize, trace
from planish.calibration import Slicing, calibration_batches, slices
from planish.decoder_source import DecoderSource
from planish.ir.errors import SourceNotFound, UnknownOption, WrongInput
from planish.recipes import find_recipe
from planish.tokenizer import Tokenizer
from safetensors.torch import save_file
from tiny_program import ids, tiny, write_recipe

TEXT = "The hammer strikes the metal, and the metal becomes smooth and true. " * 40


@pytest.fixture(scope="module")
def tokenizer(minilm_folder: Path) -> Tokenizer:
    return Tokenizer(minilm_folder)


def test_slices_have_one_length_and_the_special_tokens_of_the_model(tokenizer: Tokenizer) -> None:
    found = slices(tokenizer, TEXT, "", Slicing(5, 32))
    start, *_, end = tokenizer.encode("a")
    assert [list(piece.shape) for piece in found] == [[1, 32]] * 5
    assert all(int(piece[0, 0]) == start and int(piece[0, -1]) == end for piece in found)
    whole = tokenizer.encode(TEXT, special=False)
    inner = [piece[0, 1:-1].tolist() for piece in found]
    places = [next(i for i in range(len(whole)) if whole[i : i + 30] == part) for part in inner]
    assert places[0] == 0


def test_slices_do_not_overlap_and_reach_over_the_whole_text(tokenizer: Tokenizer) -> None:
    words = " ".join(str(number) for number in range(600))
    found = slices(tokenizer, words, "", Slicing(4, 26))
    whole = tokenizer.encode(words, special=False)
    starts = [
        next(i for i in range(len(whole)) if whole[i : i + 24] == piece[0, 1:-1].tolist())
        for piece in found
    ]
    assert starts[0] == 0
    assert all(b - a >= 24 for a, b in itertools.pairwise(starts))
    assert starts[-1] > len(whole) - 2 * 24


def test_a_short_text_gives_fewer_slices_and_one_too_short_is_refused(tokenizer: Tokenizer) -> None:
    assert 0 < len(slices(tokenizer, TEXT, "", Slicing(1000, 32))) < 1000
    with pytest.raises(WrongInput, match="too short") as caught:
        slices(tokenizer, "A few words.", "short.txt", Slicing(4, 32))
    assert "short.txt" in str(caught.value)
    assert "4 tokens" in str(caught.value)
    with pytest.raises(WrongInput, match="is empty"):
        slices(tokenizer, "", "empty.txt", Slicing(4, 32))


def test_a_text_becomes_the_inputs_of_a_program(tmp_path: Path, minilm_folder: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    program = trace(tiny(), (), {"input_ids": ids()})
    source = DecoderSource.of(minilm_folder)
    flat = calibration_batches(program, tmp_path / "text.txt", source, Slicing(3, 16))
    assert [[list(value.shape) for value in batch] for batch in flat] == [[[1, 16]]] * 3


def test_what_cannot_be_read_is_refused_with_a_way_out(tmp_path: Path, minilm_folder: Path) -> None:
    program = trace(tiny(), (), {"input_ids": ids()})
    with pytest.raises(SourceNotFound):
        calibration_batches(program, tmp_path / "missing.txt")
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(WrongInput, match="needs the model's tokenizer"):
        calibration_batches(program, tmp_path / "text.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(WrongInput, match="neither tensors nor text"):
        calibration_batches(program, tmp_path / "bytes.txt", DecoderSource.of(minilm_folder))


def test_tensors_are_read_by_the_number_of_their_batch(tmp_path: Path) -> None:
    program = trace(tiny(), (), {"input_ids": ids()})
    file = tmp_path / "batches.safetensors"
    save_file({"10.input_ids": ids(1, 4), "2.input_ids": ids(1, 5)}, file)
    flat = calibration_batches(program, file)
    assert [list(batch[0].shape) for batch in flat] == [[1, 5], [1, 4]]
    save_file({"input_ids": ids(1, 4)}, file)
    with pytest.raises(WrongInput, match="which batch it belongs to"):
        calibration_batches(program, file)


def test_an_option_without_a_pass_goes_to_every_step_that_has_it(tmp_path: Path) -> None:
    recipe = find_recipe(write_recipe(tmp_path))
    built = recipe.passes({"group_size": 8, "quantize_weights.bits": 4})
    assert built[-1].spelling() == "quantize_weights{bits=4, group_size=8}"
    assert optimize(tiny(), (ids(),), recipe=recipe, options={"bits": 4})(ids()).shape == (2, 6, 11)
    with pytest.raises(UnknownOption, match="did you mean group_size"):
        recipe.passes({"groupsize": 8})
