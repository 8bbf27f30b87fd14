"""Speculation changes nothing but the number of calls: greedy text, sampled text, boundaries."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planish import speculate
from planish.ir.errors import TextTooLong, WrongInput
from planish.sampling import Sampling, draw
from planish.speculate import Draft, NoTreeDecoder, Statistics, speculative
from torch import Tensor

VOCABULARY = 7
GREEDY = Sampling()


@functools.cache
def noise(seed: int, size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed % 2**31))


class TableDecoder:
    """Logits that a hash of the whole text picks; counts calls, and can do trees."""

    def __init__(self, vocabulary: int = VOCABULARY, context: int | None = None) -> None:
        self.vocabulary, self.context = vocabulary, context
        self.text: list[int] = []
        self.calls = 0
        self._tree: tuple[list[int], list[int]] = ([], [])

    @property
    def length(self) -> int:
        return len(self.text)

    def row(self, text: Sequence[int]) -> Tensor:
        return noise(hash((*text[-3:], len(text) % 5)), self.vocabulary) * 2

    def advance(self, tokens: Sequence[int], last: int | None = None) -> Tensor:
        if self.context is not None and self.length + len(tokens) > self.context:
            raise TextTooLong("too long")
        self.calls += 1
        self.text += tokens
        ends = range(len(self.text) - len(tokens) + 1, len(self.text) + 1)
        rows = torch.stack([self.row(self.text[:end]) for end in ends])
        return rows if last is None else rows[-last:]

    def rewind(self, length: int) -> None:
        assert 0 <= length <= self.length
        del self.text[length:]


class TreeTableDecoder(TableDecoder):
    def advance_tree(self, tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
        self.calls += 1
        self._tree = list(tokens), list(parents)
        return torch.stack([self.row([*self.text, *self._branch(i)]) for i in range(len(tokens))])

    def _branch(self, place: int) -> list[int]:
        tokens, parents = self._tree
        return [*self._branch(parents[place]), tokens[place]] if place >= 0 else []

    def keep_branch(self, path: Sequence[int]) -> None:
        tokens, parents = self._tree
        assert [parents[place] for place in path] == [-1, *path[:-1]]
        self.text += [tokens[place] for place in path]


@dataclass
class Script:
    """Proposes what it was told, whatever the text."""

    drafts: list[Draft]
    asked: list[int] = field(default_factory=list[int])

    def propose(self, context: Sequence[int], count: int) -> Draft:
        self.asked.append(count)
        return self.drafts[(len(self.asked) - 1) % len(self.drafts)] if self.drafts else Draft()


class Oracle:
    """Knows the decoder, and errs once every `wrong` tokens."""

    def __init__(self, decoder: TableDecoder, wrong: int = 10**9) -> None:
        self.decoder, self.wrong = decoder, wrong

    def propose(self, context: Sequence[int], count: int) -> Draft:
        text = list(context)
        for _ in range(count):
            best = int(self.decoder.row(text).argmax())
            text.append((best + (len(text) % self.wrong == 0)) % self.decoder.vocabulary)
        return Draft(text[len(context) :])


def plain(decoder: TableDecoder, ids: Sequence[int], sampling: Sampling, count: int) -> list[int]:
    """One token at a time."""
    text, chance = list(ids), sampling.generator()
    row = decoder.advance(text, last=1)[-1]
    for left in range(count, 0, -1):
        text.append(sampling.choose(row, text, chance))
        if left > 1:
            row = decoder.advance(text[-1:], last=1)[-1]
    return text[len(ids) :]


tokens = st.integers(-2, VOCABULARY + 2)  # unknown ones too


@st.composite
def drafts(draw_: st.DrawFn) -> Draft:
    found = draw_(st.lists(tokens, max_size=9))
    if draw_(st.booleans()):
        return Draft(found)
    return Draft(found, [draw_(st.integers(-1, place - 1)) for place in range(len(found))])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(drafts(), max_size=5),
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6),
    st.integers(1, 25),
    st.integers(0, 6),
    st.sampled_from(
        [
            GREEDY,
            Sampling(repetition_penalty=1.4),
            Sampling(temperature=1.3, seed=5),
            Sampling(temperature=0.9, top_k=3, repetition_penalty=1.2, seed=8),
        ]
    ),
)
def test_garbage_drafts_change_no_token(
    garbage: list[Draft], ids: list[int], count: int, length: int, sampling: Sampling
) -> None:
    """Chains, trees, unknown tokens. With a seed sampled text is the same too."""
    decoder, drafter = TreeTableDecoder(), Script(garbage)
    found = list(speculative(decoder, drafter, ids, sampling, count, draft_tokens=length))
    assert found == plain(TableDecoder(), ids, sampling, count)
    assert decoder.text == [*ids, *found][:-1]
    assert all(0 < asked <= length for asked in drafter.asked)


@pytest.mark.parametrize(("wrong", "calls"), [(10**9, 5), (2, 11), (1, 21)])
def test_good_drafts_save_calls(wrong: int, calls: int) -> None:
    decoder, told = TableDecoder(), Statistics()
    oracle = Oracle(decoder, wrong)
    found = list(speculative(decoder, oracle, [1, 2], GREEDY, 21, draft_tokens=4, statistics=told))
    assert found == plain(TableDecoder(), [1, 2], GREEDY, 21)
    assert decoder.calls == calls == told.steps + 1
    assert told.accepted + told.steps == 20
    assert told.tokens_per_step == 20 / told.steps
    assert told.acceptance_rate == told.accepted / told.drafted
    if wrong == 1:
        assert told.accepted == 0
    assert f"{told.tokens_per_step:.2f} tokens per step" in str(told)


@pytest.mark.parametrize("count", range(14))
def test_the_limit_of_new_tokens_may_fall_inside_an_accepted_run(count: int) -> None:
    decoder = TableDecoder()
    found = list(speculative(decoder, Oracle(decoder), [3], GREEDY, count, draft_tokens=5))
    assert found == plain(TableDecoder(), [3], GREEDY, count)
    assert decoder.text == [3, *found][:-1]


def test_a_stop_token_inside_an_accepted_run_ends_the_text() -> None:
    wanted = plain(TableDecoder(), [3], GREEDY, 40)
    for stop in range(VOCABULARY):
        if stop not in wanted:
            continue
        decoder = TableDecoder()
        run = speculative(decoder, Oracle(decoder), [3], GREEDY, 40, draft_tokens=6, stop={stop})
        found = list(run)
        assert found == wanted[: wanted.index(stop) + 1]
        assert decoder.text == [3, *found][:-1]


def test_a_reader_who_leaves_finds_the_cache_at_his_place() -> None:
    for count in range(1, 12):
        decoder = TableDecoder()
        run = speculative(decoder, Oracle(decoder), [3, 1], GREEDY, 40, draft_tokens=5)
        found = list(itertools.islice(run, count))
        run.close()  # type: ignore[attr-defined]
        assert decoder.text == [3, 1, *found][:-1]


def test_a_text_goes_on_from_what_the_cache_holds() -> None:
    decoder = TableDecoder()
    first = list(speculative(decoder, Oracle(decoder), [3, 1], GREEDY, 6))
    ids = [3, 1, *first, 4, 4]
    calls = decoder.calls
    second = list(speculative(decoder, Oracle(decoder), ids, GREEDY, 6, draft_tokens=9))
    assert second == plain(TableDecoder(), ids, GREEDY, 6)
    assert decoder.calls == calls + 2


@pytest.mark.parametrize("context", [4, 7, 10])
def test_the_context_ends_where_it_does_without_drafts(context: int) -> None:
    decoder, found = TreeTableDecoder(context=context), list[int]()
    with pytest.raises(TextTooLong):
        found.extend(speculative(decoder, Oracle(decoder), [3, 1], GREEDY, 40, draft_tokens=5))
    drafter = Script([Draft([1, 2, 3])])
    decoder = TableDecoder(context=context)
    kept = list(speculative(decoder, drafter, [3, 1], GREEDY, context - 1))
    assert kept == plain(TableDecoder(context=context), [3, 1], GREEDY, context - 1)


def test_mistakes_are_named() -> None:
    with pytest.raises(WrongInput, match="the text is empty"):
        list(speculative(TableDecoder(), Script([]), [], GREEDY, 3))
    with pytest.raises(NoTreeDecoder, match="TableDecoder"):
        list(speculative(TableDecoder(), Script([Draft([1, 2], [-1, -1])]), [1], GREEDY, 3))
    other = Draft([1], None, [torch.ones(VOCABULARY + 1) / (VOCABULARY + 1)])
    with pytest.raises(WrongInput, match="another vocabulary"):
        list(speculative(TableDecoder(), Script([other]), [1], GREEDY, 3))


class Drawn:
    """Drafts drawn from a distribution q that is unlike the decoder's; chains or trees."""

    def __init__(self, seed: int, widths: Sequence[int], vocabulary: int) -> None:
        self.chance = torch.Generator().manual_seed(seed)
        self.widths, self.vocabulary = widths, vocabulary

    def propose(self, context: Sequence[int], count: int) -> Draft:
        found: list[int] = []
        parents: list[int] = []
        probabilities: list[Tensor] = []
        level = [-1]
        for width in self.widths[:count]:
            below: list[int] = []
            for parent, _ in itertools.product(level, range(width)):
                seed = hash((found[parent] if parent >= 0 else -1, context[-1])) % 1000
                q = (noise(seed, self.vocabulary) * 1.5).double().softmax(-1)
                below.append(len(found))
                found.append(draw(q, self.chance))
                parents.append(parent)
                probabilities.append(q)
            level = below
        return Draft(found, None if set(self.widths) == {1} else parents, probabilities)


SMALL, RUNS, NEW = 4, 3000, 3


def exact_law(decoder: TableDecoder) -> tuple[dict[tuple[int, ...], int], list[float]]:
    """Every text of three tokens after [1, 2], counted 0 times, and how often it is expected."""
    counts = dict.fromkeys(itertools.product(range(decoder.vocabulary), repeat=NEW), 0)
    expected: list[float] = []
    for text in counts:
        rows = [decoder.row([1, 2, *text[:place]]).double().softmax(-1) for place in range(NEW)]
        likely = [float(row[token]) for row, token in zip(rows, text, strict=True)]
        expected.append(RUNS * math.prod(likely))
    return counts, expected


def p_value(widths: Sequence[int]) -> float:
    """Of the texts of three tokens that speculation draws, against their exact probabilities."""
    decoder = TreeTableDecoder(SMALL)
    counts, expected = exact_law(decoder)
    for seed in range(RUNS):
        drafter = Drawn(10**6 + seed, widths, SMALL)
        sampling = Sampling(temperature=1.0, seed=seed)
        counts[tuple(speculative(decoder, drafter, [1, 2], sampling, NEW))] += 1
    return chi_square(list(counts.values()), expected)


def chi_square(seen: Sequence[int], expected: Sequence[float]) -> float:
    """p of Pearson's test; cells that expect fewer than 5 are one cell."""
    pairs = sorted(zip(expected, seen, strict=True))
    rare = [pair for pair in pairs if pair[0] < 5]
    cells = [pair for pair in pairs if pair[0] >= 5]
    if rare:
        cells.append((sum(e for e, _ in rare), sum(s for _, s in rare)))
    excess = torch.tensor([(s - e) ** 2 / e for e, s in cells], dtype=torch.float64).sum()
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, excess / 2))


@pytest.mark.parametrize("widths", [(1, 1), (3, 2)])
def test_sampled_text_keeps_its_distribution(widths: Sequence[int]) -> None:
    assert p_value(widths) > 0.01


def always(
    target: Tensor, offered: Sequence[int], found: Sequence[int], *rest: Any
) -> tuple[int, int]:
    """Accepts whatever is offered."""
    if offered:
        return offered[0], found[offered[0]]
    return -1, draw(target, rest[-1])


def without_residual(
    target: Tensor,
    offered: Sequence[int],
    found: Sequence[int],
    q: Sequence[Tensor],
    chance: torch.Generator,
) -> tuple[int, int]:
    """Accepts rightly, but after a refusal draws from p instead of what is left of it."""
    for place in offered:
        if float(torch.rand((), generator=chance)) * q[place][found[place]] < target[found[place]]:
            return place, found[place]
    return -1, draw(target, chance)


@pytest.mark.parametrize("mutant", [always, without_residual])
@pytest.mark.parametrize("widths", [(1, 1), (3, 2)])
def test_the_test_of_distributions_catches_a_wrong_rule(
    widths: Sequence[int], mutant: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculate, "_judge", mutant)
    assert p_value(widths) < 1e-6
