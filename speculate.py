"""Lossless speculation: a cheap drafter guesses tokens, the decoder checks all of them in one call.

Greedy text is the same token for token; sampled text has the same distribution (Leviathan et al.
2023, Algorithm 1; for trees the multi-step rule of Miao et al. 2023, SpecInfer, sec. 4.3). A
drafter that is sure of its tokens (a lookup, the likeliest tokens of a model) has a one-hot
distribution. For it the rule amounts to drawing the next token as if there were no draft and
seeing whether the draft has it, so then equal seeds even give the text that plain decoding gives.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .decoder import Decoder
from .ir.errors import PlanishError, WrongInput
from .sampling import Sampling, draw

DRAFT_TOKENS = 12


class NoTreeDecoder(PlanishError):
    """A drafter proposes trees to a decoder that looks at one continuation at a time."""


@dataclass(frozen=True)
class Draft:
    """Tokens that may come next.

    parents: of each token the place of its parent, before it, or -1 if it follows the text; None
    for a chain. probabilities: of each token the distribution float64 [vocabulary] from which it
    was drawn, independently of its siblings; None if no chance was involved.
    """

    tokens: Sequence[int] = ()
    parents: Sequence[int] | None = None
    probabilities: Sequence[Tensor] | None = None

    def within(self, depth: int, count: int, vocabulary: int) -> Draft:
        """Without tokens that are unknown, deeper than `depth` or beyond `count`."""
        parents = range(-1, len(self.tokens) - 1) if self.parents is None else self.parents
        places: dict[int, int] = {-1: -1}
        depths: dict[int, int] = {-1: 0}
        for old, (token, parent) in enumerate(zip(self.tokens, parents, strict=True)):
            fits = parent in places and 0 <= token < vocabulary and len(places) <= count
            if fits and depths[parent] < depth:
                depths[old] = depths[parent] + 1
                places[old] = len(places) - 1
        kept = [old for old in places if old >= 0]
        if len(kept) == len(self.tokens):
            return self
        q = self.probabilities
        return Draft(
            [self.tokens[old] for old in kept],
            None if self.parents is None else [places[parents[old]] for old in kept],
            None if q is None else [q[old] for old in kept],
        )


class Drafter(Protocol):
    """Guesses how a text goes on."""

    def propose(self, context: Sequence[int], count: int) -> Draft:
        """Up to `count` tokens (in a tree: that many on a path) to follow the text `context`."""
        ...


@dataclass
class Statistics:
    """What speculation did: calls of the decoder after the prompt, drafted and accepted tokens."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance_rate(self) -> float:
        """Accepted of the drafted tokens."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Tokens a call of the decoder gave: the accepted ones and one of its own."""
        return (self.accepted + self.steps) / self.steps if self.steps else 0.0

    def __str__(self) -> str:
        return (
            f"{self.tokens_per_step:.2f} tokens per step, "
            f"{self.acceptance_rate:.0%} of {self.drafted} drafted tokens accepted"
        )


def speculative(
    decoder: Decoder,
    drafter: Drafter,
    ids: Sequence[int],
    sampling: Sampling,
    max_new_tokens: int,
    *,
    draft_tokens: int | None = None,
    stop: Collection[int] = (),
    statistics: Statistics | None = None,
) -> Iterator[int]:
    """Tokens that follow the text `ids`, as plain decoding would choose them.

    decoder: its cache may already hold a beginning of `ids`. draft_tokens: the most to check in a
    row; None for as many as pay on this decoder (its attribute `draft_tokens`, else DRAFT_TOKENS).
    stop: tokens that end the text (yielded too). However it ends, also when the reader leaves, the
    decoder's cache holds the text but for its last token. Raises TextTooLong where plain decoding
    would, WrongInput for an empty text, NoTreeDecoder.
    """
    if max_new_tokens < 1:
        return
    if draft_tokens is None:
        draft_tokens = int(getattr(decoder, "draft_tokens", DRAFT_TOKENS))
    if not ids:
        raise WrongInput("the text is empty", expected="one token or more", fix="add a prompt")
    text, chance = list(ids), sampling.generator()
    step = _Step(decoder, drafter, sampling, chance, statistics or Statistics())
    decoder.rewind(min(decoder.length, len(text) - 1))
    logits = decoder.advance(text[decoder.length :], last=1)
    run = [sampling.choose(logits[-1], text, chance)]
    try:
        while True:
            for token in run:
                text.append(token)
                yield token
                if token in stop or len(text) - len(ids) == max_new_tokens:
                    return
            left = max_new_tokens - (len(text) - len(ids))
            run = step.run(text, min(draft_tokens, left - 1))
    finally:
        decoder.rewind(min(decoder.length, len(text) - 1))


@dataclass(frozen=True)
class _Step:
    """One call of the decoder: the text's last token, which the cache lacks, and a draft."""

    decoder: Decoder
    drafter: Drafter
    sampling: Sampling
    chance: torch.Generator
    statistics: Statistics

    def run(self, text: list[int], depth: int) -> list[int]:
        """The accepted tokens and the one that the decoder adds to them."""
        decoder, begin = self.decoder, self.decoder.length
        places = depth if decoder.context is None else decoder.context - begin - 1
        draft = Draft()
        if min(depth, places) > 0:
            proposed = self.drafter.propose(text, min(depth, places))
            _check_vocabulary(proposed, decoder.vocabulary)
            most = len(proposed.tokens) if decoder.context is None else places
            draft = proposed.within(depth, most, decoder.vocabulary)
        tokens = [text[-1], *draft.tokens]
        if draft.parents is None:
            logits = decoder.advance(tokens)
        else:
            logits = _tree_decoder(decoder).advance_tree(tokens, [-1, *_shifted(draft.parents)])
        path, token = accept(logits, draft, text, self.sampling, self.chance)
        if draft.parents is None:
            decoder.rewind(begin + 1 + len(path))
        else:
            _tree_decoder(decoder).keep_branch([0, *_shifted(path)])
        self.statistics.steps += 1
        self.statistics.drafted += len(draft.tokens)
        self.statistics.accepted += len(path)
        return [*(draft.tokens[place] for place in path), token]


def _check_vocabulary(draft: Draft, vocabulary: int) -> None:
    sizes = {len(q) for q in draft.probabilities or ()} - {vocabulary}
    if sizes:
        raise WrongInput(
            "the drafter's distributions are over another vocabulary than the decoder's",
            expected=f"{vocabulary} tokens",
            found=f"{sizes.pop()} tokens",
            fix="use a draft model with the same tokenizer",
        )


def _shifted(places: Sequence[int]) -> list[int]:
    return [place + 1 for place in places]


def _tree_decoder(decoder: Any) -> Any:
    if not hasattr(decoder, "advance_tree"):
        raise NoTreeDecoder(
            "the drafter proposes a tree, but the decoder can look only at a chain",
            expected="a decoder with advance_tree and keep_branch",
            found=type(decoder).__name__,
            fix="use a drafter of chains, or a program with add_tree_mask",
        )
    return decoder


def accept(
    logits: Tensor,
    draft: Draft,
    text: Sequence[int],
    sampling: Sampling,
    chance: torch.Generator,
) -> tuple[list[int], int]:
    """The places of the accepted tokens, root first, and the token that follows them.

    logits [1 + drafted, vocabulary]: row 0 follows the text, row 1 + i the draft's token i.
    """
    children: dict[int, list[int]] = {}
    parents = range(-1, len(draft.tokens) - 1) if draft.parents is None else draft.parents
    for place, parent in enumerate(parents):
        children.setdefault(parent, []).append(place)
    path: list[int] = []
    context, here = list(text), -1
    while True:
        row, offered = logits[here + 1], children.get(here, [])
        if draft.probabilities is None:
            token = sampling.choose(row, context, chance)
            here = next((place for place in offered if draft.tokens[place] == token), -1)
        else:
            target = sampling.probabilities(row[None], context)[0]
            here, token = _judge(target, offered, draft.tokens, draft.probabilities, chance)
        if here < 0:
            return path, token
        path.append(here)
        context.append(token)


def _judge(
    target: Tensor,
    offered: Sequence[int],
    tokens: Sequence[int],
    probabilities: Sequence[Tensor],
    chance: torch.Generator,
) -> tuple[int, int]:
    """The first sibling that is accepted and its token; else -1 and a token of what is left.

    A token x is accepted with min(1, p(x) / q(x)); a refusal leaves norm(max(p - q, 0)) for p.
    """
    for place in offered:
        token, q = tokens[place], probabilities[place].double()
        number = float(torch.rand((), generator=chance, dtype=torch.float64))
        if number * float(q[token]) < float(target[token]):
            return place, token
        left = (target - q).clamp_min(0)
        mass = float(left.sum())
        # Only rounding refuses a token where nothing is left; then p equals q.
        target = left / mass if mass > 0 else target
    return -1, draw(target, chance)


__all__ = [
    "DRAFT_TOKENS",
    "Draft",
    "Drafter",
    "NoTreeDecoder",
    "Statistics",
    "accept",
    "speculative",
]
