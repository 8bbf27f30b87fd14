"""Generator: the greedy text of transformers, sampling, stopping, streams, refusals; GenAI."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai
import planish
import pytest
import tiny_decoders as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.decode_onnx import OnnxDecoder
from planish.decode_program import ProgramDecoder
from planish.decoder_folder import NotADecoderFolder
from planish.decoder_source import DecoderSource
from planish.generator import Generator
from planish.ir.errors import PlanishError, TextTooLong, UnknownOption, WrongInput, WrongOption
from planish.passes.add_tree_mask import AddTreeMask
from planish.passes.pipeline import Pipeline
from planish.recipes import find_recipe
from planish.stopping import StopText
from planish.tokenizer import TextStream, Tokenizer

IDS = [17, 45, 99, 201, 33, 8, 60]
FORMS = ["shared", "growing"]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("decoders")


@pytest.fixture(scope="session")
def generator(base: Path) -> Generator:
    return Generator(tiny.exported(base), threads=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_the_greedy_text_is_that_of_transformers(base: Path, form: str, rows: int) -> None:
    made = planish.Generator(tiny.exported(base, form, rows), threads=1)
    wanted = tiny.greedy(IDS, 20)
    for prompt in (IDS, torch.tensor(IDS), torch.tensor([IDS]), tuple(IDS), np.array(IDS)):
        found = made.generate(prompt, max_new_tokens=20)  # pyright: ignore
        assert found == wanted
    assert torch.equal(torch.as_tensor(found), torch.tensor(wanted))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_genai_generates_the_same_tokens(base: Path, form: str, rows: int) -> None:
    folder = tiny.exported(base, form, rows)
    model = genai.Model(str(folder))
    ours = Generator(folder, threads=1)
    for ids in (IDS, [*IDS, *IDS, 5], [9]):
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + 20)
        theirs = genai.Generator(model, params)
        theirs.append_tokens(np.array([ids], dtype=np.int32))
        while not theirs.is_done():
            theirs.generate_next_token()
        found = [token for token in ours.generate(ids, max_new_tokens=20) if token != tiny.END]
        assert theirs.get_sequence(0).tolist()[len(ids) :] == found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_the_decoder_equals_the_program(base: Path, form: str, rows: int) -> None:
    """In ragged pieces, with going back, however few rows the folder gives at once."""
    decoder = OnnxDecoder(tiny.exported(base, form, rows), threads=1)
    plain = ProgramDecoder(tiny.program())
    ids = torch.randint(3, decoder.vocabulary, (23,)).tolist()
    whole = plain.advance(ids)

    def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
        assert found.dtype == torch.float32 and found.shape == wanted.shape
        # one float32 computation against another one, of logits of size 1
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(whole.abs().max()))

    close(decoder.advance(ids[:9]), whole[:9])
    close(decoder.advance(ids[9:10]), whole[9:10])
    close(decoder.advance(ids[10:], last=3), whole[-3:])
    assert decoder.length == 23
    decoder.rewind(5)
    other = decoder.advance([3, 4], last=2)
    decoder.rewind(5)
    close(decoder.advance(ids[5:], last=7), whole[-7:])
    assert not torch.allclose(other, whole[5:7])
    assert decoder.advance(ids[:2], last=0).shape == (0, decoder.vocabulary)
    decoder.rewind(0)
    close(decoder.advance(ids), whole)


def test_a_tree_is_what_the_program_makes_of_it(base: Path) -> None:
    """A folder with the inputs of add_tree_mask: all branches, and the text after one of them."""
    program = Pipeline([AddTreeMask()]).run(tiny.program())
    folder = base / "tree"
    planish.Optimized(program, find_recipe("exact"), source=DecoderSource()).export(folder)
    found, wanted = OnnxDecoder(folder, threads=1), ProgramDecoder(program)
    ids, parents = [9, 30, 31, 40, 41, 50], [-1, 0, 0, 1, 2, 2]
    for text in (IDS, [77]):
        for decoder in (found, wanted):
            decoder.advance(text)
        ours, theirs = (decoder.advance_tree(ids, parents) for decoder in (found, wanted))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))
        for decoder in (found, wanted):
            decoder.keep_branch([0, 2, 5])
        assert found.length == wanted.length
        ours, theirs = (decoder.advance([12, 13]) for decoder in (found, wanted))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))
    chain = OnnxDecoder(tiny.exported(base), threads=1)
    with pytest.raises(NotADecoderFolder, match="cannot look at a tree of tokens"):
        chain.advance_tree([5], [-1])


def test_a_long_text_goes_in_pieces(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(3, 200, (tiny.CONTEXT,)).tolist()
    for form in FORMS:
        decoder = OnnxDecoder(tiny.exported(base, form), threads=1)
        whole = decoder.advance(ids)
        with monkeypatch.context() as patch:
            patch.setattr("planish.decode_onnx.PIECE", 40)
            patch.setattr("planish.onnx_cache.FIRST_CAPACITY", 16)
            pieces = OnnxDecoder(tiny.exported(base, form), threads=1)
            found = pieces.advance(ids)
        torch.testing.assert_close(found, whole, rtol=0, atol=2e-5 * float(whole.abs().max()))


def test_a_shared_cache_stays_in_its_buffers(base: Path) -> None:
    """No copy of the cache: from token to token the same memory is read and written."""
    decoder = OnnxDecoder(tiny.exported(base), threads=1)
    decoder.advance(IDS)
    cache: Any = decoder._cache
    buffers = list(cache._buffers)
    before = [buffer.copy() for buffer in buffers]
    decoder.advance([5])
    for now, old, buffer in zip(cache._buffers, before, buffers, strict=True):
        assert now is buffer and now.shape[2] == tiny.CONTEXT
        assert np.array_equal(now[:, :, : len(IDS)], old[:, :, : len(IDS)])
        assert not np.array_equal(now[:, :, len(IDS)], old[:, :, len(IDS)])


def test_a_branch_of_shared_buffers_is_moved_in_place(base: Path) -> None:
    decoder = OnnxDecoder(tiny.exported(base), threads=1)
    decoder.advance(IDS)
    cache: Any = decoder._cache
    before = [buffer.copy() for buffer in cache._buffers]
    cache.select(2, [0, 2, 4])
    for now, old in zip(cache._buffers, before, strict=True):
        assert np.array_equal(now[:, :, :5], old[:, :, [0, 1, 2, 4, 6]])


def test_rows_of_a_batch_are_texts_of_their_own(generator: Generator) -> None:
    rows = torch.tensor([IDS, IDS[::-1]])
    found = generator.generate(rows, max_new_tokens=8)
    assert found == [tiny.greedy(IDS, 8), tiny.greedy(IDS[::-1], 8)]


def test_a_seed_is_a_text(generator: Generator) -> None:
    def text(seed: int, **more: Any) -> list[int]:
        return generator.generate(IDS, max_new_tokens=16, temperature=1.0, seed=seed, **more)

    assert text(1) == text(1) != text(2)
    assert text(1, top_k=1) == tiny.greedy(IDS, 16)
    assert text(3, top_p=0.3, min_p=0.2, top_k=20, repetition_penalty=1.3) == text(
        3, top_p=0.3, min_p=0.2, top_k=20, repetition_penalty=1.3
    )


def test_the_end_token_ends_the_text(base: Path) -> None:
    wanted = tiny.greedy(IDS, 20)
    made = Generator(tiny.exported(base), ends=[wanted[4]], threads=1)
    found = made.generate(IDS, max_new_tokens=20)
    assert found == wanted[: wanted.index(wanted[4]) + 1] and found.stopped_by == "end"
    assert Generator(tiny.exported(base), threads=1).ends == {tiny.END}


def test_the_context_ends_the_text(generator: Generator) -> None:
    full = [*range(10, 10 + tiny.CONTEXT)]
    found = generator.generate(full[:-3], max_new_tokens=9)
    assert len(found) == 3 and found.stopped_by == "context"
    none = generator.generate(full, max_new_tokens=9)
    assert none == [] and none.stopped_by == "context"
    assert generator.generate(IDS, max_new_tokens=3).stopped_by == "length"
    assert generator.generate(IDS, max_new_tokens=0) == []
    with pytest.raises(TextTooLong, match="does not fit into the model's context"):
        generator.generate([*full, 5])


def test_an_empty_prompt_begins_with_the_begin_token(generator: Generator) -> None:
    wanted = tiny.greedy([tiny.BEGIN], 6)
    assert generator.generate([], max_new_tokens=6) == wanted
    assert generator.generate("", max_new_tokens=6) == wanted
    assert generator.generate(torch.tensor([]), max_new_tokens=6) == wanted
    without = Generator(ProgramDecoder(tiny.program()))
    with pytest.raises(WrongInput, match="the prompt is empty, and the model has no token"):
        without.generate([])


def refused(error: type[PlanishError], sentence: str, call: Any) -> None:
    with pytest.raises(error) as caught:
        call()
    assert sentence in caught.value.what and caught.value.expected + caught.value.fix


def test_refusals_are_one_sentence(generator: Generator, base: Path) -> None:
    bare = Generator(tiny.exported(base, "growing", text=False), threads=1)
    for call, error, sentence in [
        (lambda: generator.generate([5, 9999]), WrongInput, "9999 is not in the model's vocab"),
        (lambda: generator.generate([5, -1]), WrongInput, "-1 is not in the model's vocabulary"),
        (lambda: generator.generate([0.5, 1]), WrongInput, "a prompt is one text"),  # pyright: ignore
        (lambda: generator.stream(torch.ones(2, 3)), WrongInput, "a prompt is one text"),
        (lambda: generator.generate(IDS, topk=3), UnknownOption, "unknown option 'topk'"),  # pyright: ignore
        (lambda: generator.generate(IDS, top_p=3.0), WrongOption, "top_p cannot be 3.0"),
        (lambda: generator.generate(IDS, max_new_tokens=-1), WrongOption, "max_new_tokens"),
        (lambda: generator.generate(IDS, stop=[""]), WrongOption, "stop string cannot be empty"),
        (lambda: bare.generate("text"), WrongInput, "a prompt of text needs a tokenizer"),
        (lambda: bare.generate(IDS, stop=["x"]), WrongInput, "stop strings needs a tokenizer"),
        (lambda: bare.chat_ids([]), WrongInput, "a conversation needs a tokenizer"),
    ]:
        refused(error, sentence, call)
    assert bare.generate(IDS, max_new_tokens=4) == tiny.greedy(IDS, 4)


# text ---------------------------------------------------------------------------------------


def test_pieces_join_to_the_text(generator: Generator) -> None:
    stream = generator.stream("then the", max_new_tokens=60, temperature=1.5, seed=4)
    pieces = list(stream)
    assert [piece.token for piece in pieces] == stream.result
    assert "".join(piece.text for piece in pieces) == stream.result.text
    whole = generator.tokenizer.decode(stream.result)  # pyright: ignore[reportOptionalMemberAccess]
    assert stream.result.text == whole
    assert stream.result.prompt == len(generator.prompt_ids("then the"))


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40), cut=st.integers(0, 200))
def test_a_stream_shows_whole_characters(base: Path, text: str, cut: int) -> None:
    """Every piece is part of the text, none ends in half a character, together they are it."""
    codec = Tokenizer(tiny.exported(base))
    ids = codec.encode(text)
    stream = TextStream(codec)
    pieces = [stream.add(token) for token in ids]
    assert all("\ufffd" not in piece for piece in pieces if "\ufffd" not in text)
    assert "".join(pieces) + stream.rest() == codec.decode(ids) == text
    part = TextStream(codec, ids[:cut])
    shown = "".join(part.add(token) for token in ids[cut:]) + part.rest()
    if codec.decode(ids[:cut]) == text[: len(codec.decode(ids[:cut]))]:
        assert codec.decode(ids[:cut]) + shown == text


def test_a_stop_string_across_tokens(generator: Generator) -> None:
    options: Any = {"max_new_tokens": 80, "temperature": 1.0, "seed": 11}
    whole = generator.generate("the", **options)
    text = whole.text
    start = next(i for i in range(20, len(text) - 3) if text.find(text[i : i + 3]) == i)
    stop = text[start : start + 3]
    stream = generator.stream("the", stop=["never there", stop], **options)
    pieces = [piece.text for piece in stream]
    assert "".join(pieces) == text[:start] == stream.result.text
    assert stream.result.stopped_by == "stop"
    assert list(stream.result) == list(whole)[: len(stream.result)]
    assert len(stream.result) < len(whole)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab", max_size=24),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 24), max_size=8),
)
def test_stop_strings_do_not_see_the_pieces(text: str, stops: list[str], cuts: list[int]) -> None:
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    wanted = text[: min(ends)[1]] if ends else text
    places = sorted({0, *(min(cut, len(text)) for cut in cuts), len(text)})
    stopper, shown = StopText(stops), ""
    for start, end in itertools.pairwise(places):
        shown += stopper.add(text[start:end])
        if stopper.found is not None:
            break
    shown += stopper.rest()
    assert shown == wanted and (stopper.found is not None) == bool(ends)


def test_a_stream_can_be_left(generator: Generator) -> None:
    left = generator.stream(IDS, max_new_tokens=30)
    first = [next(left).token for _ in range(4)]
    assert generator.generate(IDS, max_new_tokens=20) == tiny.greedy(IDS, 20)
    assert list(left) == [] and left.result == first and left.result.stopped_by == "close"


def test_speeds_are_told(generator: Generator) -> None:
    found = generator.generate(IDS, max_new_tokens=12)
    assert found.prompt_tokens_per_second > 0 and found.tokens_per_second > 0
    assert generator.generate(IDS, max_new_tokens=0).tokens_per_second == 0


def test_a_conversation_is_spelled_by_the_template(generator: Generator) -> None:
    messages = [{"role": "user", "content": " hi the\n"}, {"role": "assistant", "content": "a"}]
    wanted = tiny.tokenizer().apply_chat_template(messages, add_generation_prompt=True)
    assert generator.chat_ids(messages) == wanted["input_ids"]


# the real model -----------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_says_the_same_in_genai(smollm2_gguf: Path, tmp_path: Path) -> None:
    made = planish.optimize(smollm2_gguf, recipe="int4", kv_cache=True)
    folder = made.export(tmp_path / "out", target="onnx")
    ours = Generator(folder, threads=2)
    model = genai.Model(str(folder))
    codec = genai.Tokenizer(model)
    for prompt in ("The capital of France is", "Once upon a time", "def fibonacci(n):\n"):
        params = genai.GeneratorParams(model)
        ids = codec.encode(prompt)
        assert ids.tolist() == ours.prompt_ids(prompt)
        params.set_search_options(max_length=len(ids) + 40)
        theirs = genai.Generator(model, params)
        theirs.append_tokens(ids)
        while not theirs.is_done():
            theirs.generate_next_token()
        text = codec.decode(theirs.get_sequence(0)[len(ids) :])
        assert text == ours.generate(prompt, max_new_tokens=40).text
