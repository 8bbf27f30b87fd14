"""A smaller decoder as drafter: another model of the same vocabulary, or a model's first layers.

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .decoder import Decoder
from .sampling import Sampling, draw
from .speculate import Draft


class ModelDrafter:
    """Proposes what a smaller decoder would say, its cache kept in step with the text.

    sampling: as for the text itself. Greedy proposals are the likeliest tokens; otherwise they
    are drawn, and their distributions go with them. confidence: a proposal ends where the draft
    model's likeliest token has less probability than this. (The drawn token must not decide: what
    is then proposed would no longer be distributed as it says.)
    """

    def __init__(
        self, decoder: Decoder, sampling: Sampling | None = None, confidence: float = 0.0
    ) -> None:
        self.decoder, self.confidence = decoder, confidence
        self.sampling = sampling or Sampling()
        self.chance = independent(self.sampling)
        self.text = TextFollower(decoder)

    def propose(self, context: Sequence[int], count: int) -> Draft:
        """Up to `count` tokens; none where the text outgrew the draft model's own context."""
        limit = self.decoder.context
        if limit is not None:
            count = min(count, limit - len(context) + 1)
        if count < 1:
            return Draft()
        row = self.text.follow(context)
        tokens: list[int] = []
        probabilities: list[Tensor] = []
        while True:
            if self.confidence and float(row.softmax(-1).max()) < self.confidence:
                break
            q = self.sampling.probabilities(row[None], [*context, *tokens])[0]
            token = draw(q, self.chance)
            tokens.append(token)
            probabilities.append(q)
            if len(tokens) == count:
                break
            row = self.text.append(token)
        return Draft(tokens, None, None if self.sampling.greedy else probabilities)


class TextFollower:
    """A decoder whose cache follows a text that may have changed its end."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._cached: list[int] = []

    def follow(self, context: Sequence[int]) -> Tensor:
        """Logits [vocabulary] of the text's last token; computes only what is new."""
        pairs = zip(self._cached, context[:-1], strict=False)
        same = next(
            (place for place, (old, new) in enumerate(pairs) if old != new),
            min(len(self._cached), len(context) - 1),
        )
        self.back_to(same)
        self._cached += context[same:]
        return self.decoder.advance(context[same:], last=1)[-1]

    def append(self, token: int) -> Tensor:
        """Logits [vocabulary] after one more token."""
        self._cached.append(token)
        return self.decoder.advance([token], last=1)[-1]

    def back_to(self, length: int) -> None:
        """Forget what comes after the first `length` tokens."""
        self.decoder.rewind(length)
        del self._cached[length:]


def independent(sampling: Sampling) -> torch.Generator:
    """Chance for a drafter. With the numbers that judge the drafts the text would be biased."""
    if sampling.seed is None:
        return sampling.generator()
    return replace(sampling, seed=sampling.seed ^ 0x2545F4914F6CDD1D).generator()
