"""insert_kv_cache: what it adds to a program, what it takes, what it refuses and why."""

from __future__ import annotations

import functools
from collections.abc import Callable

import cached_decoders
import pytest
import torch
import zoo
from captured import captured, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.ir.capture import capture_module
from planish.ir.errors import WrongOption
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.ir.text import program_diff
from planish.passes.insert_kv_cache import CannotCache, InsertKvCache, empty_past
from planish.passes.pipeline import Pipeline
from planish.recipes import pipeline
from small_decoder import PLACES, SmallDecoder, left_padding, raised, tokens
from torch import Tensor


def cache(program: Program, step: InsertKvCache | None = None) -> Program:
    steps = [step or InsertKvCache()]
    return Pipeline(steps, verify="numbers", on_break="raise").run(program)


def in_pieces(program: Program, ids: Tensor, cuts: list[int], *, wide: bool = True) -> Tensor:
    past: list[Tensor] = empty_past(program, ids.shape[0])
    found: list[Tensor] = []
    for start, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        logits, *past = run(program, [ids[:, start:end], *past], float64=wide)
        found.append(logits)
    return torch.cat(found, 1)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


AUTO = torch.export.Dim.AUTO
GUARD = ("--", "++")


@functools.cache
def small(padded: bool = False) -> Program:
    return raised(SmallDecoder(), *(["padding"] if padded else []))


def test_what_is_added() -> None:
    text = program_diff(small(), cache(small()), context=0)
    changed = [line for line in text.splitlines() if line[0] in "+-" and line[:2] not in GUARD]
    assert changed == [
        "+%past_key_0 : f32[n0, 1, n2, 5]",
        "+%past_value_0 : f32[n0, 1, n2, 7]",
        "+%sym_size_2 = sym_size(%past_key_0, 2) : int n2",
        "-%places = arange(%sym_size_1, dtype=i64, device=device(type='cpu')) : i64[n1]",
        "-%places.table = embedding(%places.table.weight, %places) : f32[n1, 15]",
        "+%places.arange = arange(%sym_size_1, dtype=i64, device=device(type='cpu')) : i64[n1]",
        "+%places.add = add(%places.arange, %sym_size_2) : i64[n1]",
        "+%places.table = embedding(%places.table.weight, %places.add) : f32[n1, 15]",
        "-%attention = attention(%transpose, %unsqueeze, %unsqueeze_1, scale=0.4, causal=True)"
        " : f32[n0, 3, n1, 7]",
        "+%cat = cat([%past_key_0, %unsqueeze], 2) : f32[n0, 1, n1 + n2, 5]",
        "+%cat_1 = cat([%past_value_0, %unsqueeze_1], 2) : f32[n0, 1, n1 + n2, 7]",
        "+%attention = attention(%transpose, %cat, %cat_1, scale=0.4, causal=True)"
        " : f32[n0, 3, n1, 7]",
        "-return [%out]",
        "+return [%out, %cat, %cat_1]",
    ]


@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(2, 17),
    cuts=st.sets(st.integers(1, 16)),
    padded=st.booleans(),
)
def test_any_pieces_of_any_batch(batch: int, length: int, cuts: set[int], padded: bool) -> None:
    ids, mask = tokens(batch, length), left_padding(batch, length)
    plain = small(padded)
    cached = small_cache(padded)
    wanted = run(plain, [ids, mask][: len(plain.inputs)], float64=True)[0]
    past, found = empty_past(cached, batch), list[Tensor]()
    ends = [*sorted(cut for cut in cuts if cut < length), length]
    for start, end in zip([0, *ends], ends, strict=False):
        inputs = [ids[:, start:end], mask[:, :end]][: len(plain.inputs)]
        logits, *past = run(cached, [*inputs, *past], float64=True)
        found.append(logits)
    assert relative(torch.cat(found, 1), wanted) < 1e-12  # boolean masks: at padded places too


@functools.cache
def small_cache(padded: bool) -> Program:
    return cache(small(padded))


@pytest.mark.parametrize(("name", "attention"), [("llama", "sdpa"), ("bloom", "eager")])
def test_token_ids_alone(name: str, attention: zoo.Attention) -> None:
    """Without a mask input, bloom's bias comes from a counted length."""
    plain = cached_decoders.raised(name, attention)
    cached = cache(plain)
    for batch, length in ((1, 21), (3, 14)):
        ids = torch.randint(3, zoo.VOCABULARY, (batch, length))
        wanted = run(plain, [ids], float64=True)[0]
        own = relative(run(plain, [ids])[0], wanted)
        for cuts in (list(range(1, length)), [5, 6, 11]):
            assert relative(in_pieces(cached, ids, cuts), wanted) < 1e-12, (batch, cuts)
            assert relative(in_pieces(cached, ids, cuts, wide=False), wanted) <= 4 * own


def test_it_is_called_with_past_and_returns_the_present() -> None:
    cached = cache(cached_decoders.raised("llama", "sdpa"))
    ids = torch.randint(3, zoo.VOCABULARY, (2, 6))
    flat = empty_past(cached, 2)
    past = tuple(zip(flat[::2], flat[1::2], strict=True))
    result, present = cached(input_ids=ids, past=past)
    assert result["logits"].shape == (2, 6, zoo.VOCABULARY)
    assert [tuple(key.shape) for key, _ in present] == [(2, 2, 6, 10)] * 2
    result, present = cached(input_ids=ids[:, :1], past=present)
    assert present[0][0].shape[2] == 7
    assert "cached" in cached.facts
    layer = {"kv_heads": 2, "head": 10, "value_head": 10, "window": 0, "kept": None}
    layers = [{**layer, "dtype": "float32"}] * 2
    told = {"form": "growing", "layers": layers, "context": None, "mask": None}
    assert cached.metadata["cache"] == told


@pytest.mark.parametrize(("name", "context"), [("gpt2", 64), ("opt", 64), ("cohere", None)])
def test_tables_of_places_limit_the_context(name: str, context: int | None) -> None:
    cached = cache(pipeline("raise").run(captured(name, "sdpa")))
    assert cached.metadata["cache"]["context"] == context
    assert cached.metadata["cache"]["mask"] == "attention_mask"


def test_position_ids_stay_those_of_the_new_tokens() -> None:
    plain = raised(SmallDecoder(), "padding", "places")
    cached = cache(plain)
    ids, mask = tokens(3, 13), left_padding(3, 13)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    wanted = run(plain, [ids, mask, places], float64=True)[0]
    past, found = empty_past(cached, 3), list[Tensor]()
    for end in range(1, 14):
        new = slice(end - 1, end)
        given = [ids[:, new], mask[:, :end], places[:, new]]
        logits, *past = run(cached, [*given, *past], float64=True)
        found.append(logits)
    assert relative(torch.cat(found, 1), wanted) < 1e-12


def test_position_ids_that_tell_texts_apart_are_refused() -> None:
    """Without attention_mask, the library makes its mask of position ids that do not rise by 1."""
    made = sample("llama", "sdpa")
    ids = made.kwargs["input_ids"]
    places = torch.arange(ids.shape[1]).expand(len(ids), -1).contiguous()
    plain = pipeline("raise").run(
        capture_module(made.model, (), {"input_ids": ids, "position_ids": places})
    )
    told = "has a mask that tells texts apart by counting the places in position_ids"
    assert told in refusal(plain)


def refusal(program: Program, step: InsertKvCache | None = None) -> str:
    with pytest.raises(CannotCache) as caught:
        cache(program, step)
    return caught.value.what


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("bert", "is not causal: text to come would change what is kept"),
        ("vit", "attends over a fixed length: a cache needs a text of free length"),
        ("mamba", "no attention was recognized, so there are no keys and values to keep"),
        ("bart", "belongs to an encoder, whose keys would be computed again for every token"),
        ("whisper", "belongs to an encoder, whose keys would be computed again for every token"),
    ],
)
def test_other_architectures_are_refused_in_one_sentence(name: str, told: str) -> None:
    attention: zoo.Attention = zoo.ARCHITECTURES[name].attentions[0]
    program = pipeline("raise").run(captured(name, attention))
    assert told in refusal(program)


MISSES: dict[str, tuple[Callable[[], SmallDecoder], str]] = {
    "a key too many": (
        lambda: SmallDecoder(visible=lambda query, key: (key <= query + 1) | (key == 0)),
        "is not causal",
    ),
    "a running sum of the text": (
        lambda: SmallDecoder(mix=lambda x: x.cumsum(1)),
        "mixes places of the text outside of attention",
    ),
    "a mean of the text": (
        lambda: SmallDecoder(mix=lambda x: x - x.mean(1, keepdim=True)),
        "mixes places of the text outside of attention",
    ),
    "places counted from the end": (
        lambda: SmallDecoder(place=lambda counted: counted.flip(0)),
        "token by token the cached program does not compute what the whole text gives",
    ),
}


@pytest.mark.parametrize("name", MISSES)
def test_near_misses(name: str) -> None:
    make, told = MISSES[name]
    assert told in refusal(raised(make()))


class PaddingFromTokens(SmallDecoder):
    """Token 0 is padding."""

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(tokens, tokens != 0)


class PairsOfPlaces(SmallDecoder):
    """With a mask int64[batch, queries, keys]."""

    def forward(self, tokens: Tensor, pairs: Tensor) -> Tensor:  # type: ignore[override]
        self.visible = lambda query, key: (key <= query) & pairs[:, None].bool()
        return super().forward(tokens)


def test_masks_that_are_not_one_value_for_each_place() -> None:
    made = capture_module(PaddingFromTokens().eval(), (), {"tokens": tokens()})
    told = refusal(pipeline("raise").run(made))
    assert told == "the attention masks are made of the contents of the tokens themselves"
    inputs = {"tokens": tokens(2, 11), "pairs": torch.ones(2, 11, 11, dtype=torch.int64)}
    free = {"tokens": dict.fromkeys((0, 1), AUTO), "pairs": dict.fromkeys((0, 1, 2), AUTO)}
    made = capture_module(PairsOfPlaces().eval(), (), inputs, free)
    told = refusal(pipeline("raise").run(made))
    assert told == "the input pairs has a value for every pair of places"


def test_an_explicit_mask_that_hides_what_is_to_come() -> None:
    """Causal, but with a hole in it: no formula, so the mask is computed for all keys."""
    plain = raised(SmallDecoder(visible=lambda q, k: (k <= q) & ((k != 2) | (q <= 4))))
    cached = cache(plain)
    ids = tokens(3, 13)
    wanted = run(plain, [ids], float64=True)[0]
    assert relative(in_pieces(cached, ids, list(range(1, 13))), wanted) < 1e-12
    text = str(cached)
    assert "bool[n1, n1 + n2]" in text and "[n1 + n2, n1 + n2]" not in text


def test_a_second_cache_is_refused() -> None:
    told = "the program has an input past_key_0 already"
    assert told in refusal(small_cache(False))


def test_options() -> None:
    with pytest.raises(WrongOption, match=r"insert_kv_cache\.window cannot be 'rings'"):
        InsertKvCache(window="rings")
    with pytest.raises(WrongOption, match=r"insert_kv_cache\.static cannot be 0"):
        InsertKvCache(static=0)
    told = f"buffers for {PLACES + 1} tokens are longer than any text of this model"
    assert told in refusal(small(), InsertKvCache(static=PLACES + 1))


def windowed() -> Program:
    return raised(SmallDecoder(visible=lambda query, key: (key <= query) & (key > query - 4)))


def test_rings_alone_take_the_length_as_an_input() -> None:
    """No layer's past and no mask tells how long the text is."""
    plain = windowed()
    cached = cache(plain, InsertKvCache(window="ring"))
    assert [node.name for node in cached.inputs][-1] == "past_length"
    ids = tokens(3, 13)
    wanted = run(plain, [ids], float64=True)[0]
    past, found = tuple[tuple[Tensor, Tensor], ...](), list[Tensor]()
    flat = empty_past(cached, 3)
    assert flat[-1] == 0
    past = ((flat[0], flat[1]),)
    for start, end in ((0, 2), (2, 3), (3, 9), (9, 10), (10, 13)):
        logits, past = cached(tokens=ids[:, start:end], past=past, past_length=start)
        assert past[0][0].shape[2] == min(end, 3)
        found.append(logits)
    own = relative(run(plain, [ids])[0], wanted)
    assert relative(torch.cat(found, 1), wanted) <= 4 * own


@pytest.mark.parametrize("window", ["keep", "ring"])
def test_buffers_are_called_with_a_position(window: str) -> None:
    plain = windowed()
    cached = cache(plain, InsertKvCache(static=17, window=window))
    ids = tokens(2, 17)
    wanted = run(plain, [ids], float64=True)[0]
    own = relative(run(plain, [ids])[0], wanted)
    *buffers, begin = empty_past(cached, 2)
    assert begin.dtype == torch.int64 and begin.dim() == 0
    past, found = ((buffers[0], buffers[1]),), list[Tensor]()
    for start, end in ((0, 6), (6, 7), (7, 16), (16, 17)):
        at = torch.tensor(start)
        logits, past = cached(tokens=ids[:, start:end], past=past, position=at)
        found.append(logits)
    assert past[0][0].shape == buffers[0].shape == (2, 1, 17 if window == "keep" else 4, 5)
    assert relative(torch.cat(found, 1), wanted) <= 4 * own


def test_the_examples_of_a_cached_program_run() -> None:
    for step in (InsertKvCache(), InsertKvCache(static=9), InsertKvCache(static=9, window="ring")):
        cached = cache(small(True), step)
        assert len(cached.examples) == len(cached.inputs)
        run(cached, list(cached.examples))
