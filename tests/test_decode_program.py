"""ProgramDecoder: piece by piece, backwards, with any way to run the program; its refusals."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
import zoo
from planish.decode_program import NotADecoder, ProgramDecoder
from planish.ir.errors import TextTooLong, WrongInput
from planish.ir.interpret import run
from planish.passes.insert_kv_cache import InsertKvCache
from planish.passes.keep_last_logits import KeepLastLogits
from planish.passes.pipeline import Pipeline
from speculation import DECODERS, cached, prompt, raised


@pytest.mark.parametrize(("name", "attention"), DECODERS)
def test_pieces_and_steps_back_give_the_rows_of_the_whole(
    name: str, attention: zoo.Attention
) -> None:
    text = list(prompt(20))
    wanted = run(raised(name, attention), [torch.tensor([text])], float64=True)[0][0].float()
    program = cached(name, attention)
    decoder = ProgramDecoder(program, partial(run, program, float64=True))
    rows = [decoder.advance(text[:7])]
    decoder.advance([5, 6, 7])
    decoder.rewind(4)
    assert decoder.length == 4
    rows = [rows[0][:4], decoder.advance(text[4:9]), decoder.advance(text[9:], last=3)]
    assert [len(part) for part in rows] == [4, 5, 3]
    torch.testing.assert_close(torch.cat(rows), wanted[[*range(9), 17, 18, 19]])
    decoder.rewind(0)
    torch.testing.assert_close(decoder.advance(text), wanted)


def test_it_runs_by_whatever_is_given() -> None:
    program, shapes = cached("llama"), list[Any]()

    def watched(inputs: Sequence[Any]) -> list[Any]:
        shapes.append([tuple(value.shape) for value in inputs[:2]])
        return run(program, inputs)

    decoder = ProgramDecoder(program, watched)
    decoder.advance([3, 4, 5])
    decoder.advance([6])
    assert shapes == [[(1, 3), (1, 2, 0, 10)], [(1, 1), (1, 2, 3, 10)]]
    assert (decoder.vocabulary, decoder.length) == (zoo.VOCABULARY, 4)


def test_mistakes_change_nothing() -> None:
    decoder = ProgramDecoder(cached("gpt2"))
    assert decoder.context == 64  # its table of positions
    decoder.advance(prompt(60))
    for tokens, mistake in (
        ([1, 2, 3, 4, 5], TextTooLong),
        ([], WrongInput),
        ([zoo.VOCABULARY], WrongInput),
        ([-1], WrongInput),
    ):
        with pytest.raises(mistake):
            decoder.advance(tokens)
    for length in (-1, 61):
        with pytest.raises(WrongInput, match="rewound"):
            decoder.rewind(length)
    assert decoder.length == 60
    short = ProgramDecoder(Pipeline([KeepLastLogits(2)]).run(cached("llama")))
    assert len(short.advance([3, 4, 5], last=2)) == 2
    with pytest.raises(WrongInput, match="last tokens only"):
        short.advance([3, 4, 5])
    assert short.length == 3


def test_programs_that_cannot_decode_are_refused() -> None:
    with pytest.raises(NotADecoder, match="cannot decode token by token"):
        ProgramDecoder(raised("llama"))
    static = Pipeline([InsertKvCache(static=32)]).run(raised("llama"))
    with pytest.raises(NotADecoder, match="a cache that is static"):
        ProgramDecoder(static)
    forgetful = cached("llama").copy()
    forgetful.metadata["cache"] = {**forgetful.metadata["cache"], "rewind": False}
    decoder = ProgramDecoder(forgetful)
    decoder.advance([3, 4])
    decoder.rewind(2)
    with pytest.raises(NotADecoder, match="cannot go back"):
        decoder.rewind(1)
