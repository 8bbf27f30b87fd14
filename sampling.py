"""From logits to the next token: greedy, temperature, top-k, top-p, min-p, repetition penalty.

The steps and their order are those of `generate` in transformers: the penalty for tokens that the
text already holds (Keskar et al. 2019, CTRL), the temperature, the k likeliest tokens (Fan et al.
2018), the nucleus of mass p (Holtzman et al. 2020), and the tokens at least min_p times as likely
as the likeliest (Nguyen et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .ir.errors import PlanishError, WrongOption

_NUCLEUS = 512


class BadLogits(PlanishError):
    """A model's logits tell nothing: one of them is NaN, or all are minus infinity."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults take the likeliest one.

    temperature: 0 is greedy, whatever the other limits are. top_k: how many tokens stay (0: all).
    top_p: the mass that stays, the likeliest first. min_p: a token stays if it is at least this
    share as likely as the likeliest. repetition_penalty: divides the positive logits of tokens in
    the text, multiplies the negative ones. seed: equal seeds give equal texts; None draws one.
    Raises WrongOption.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more")
        _check("top_k", self.top_k, self.top_k >= 0, "a count, or 0 for no limit")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, 0 < penalty < math.inf, "above 0; 1 is none")

    @property
    def greedy(self) -> bool:
        """Whether no chance is involved."""
        return self.temperature == 0

    def generator(self) -> torch.Generator:
        """A source of chance in the state that the seed names."""
        made = torch.Generator()
        if self.seed is None:
            made.seed()
        else:
            made.manual_seed(self.seed)
        return made

    def probabilities(self, logits: Tensor, context: Sequence[int] = ()) -> Tensor:
        """The distribution of the next token, float64 [n, vocabulary], of logits [n, vocabulary].

        context: the tokens before, the same for all rows; only the penalty looks at them. Greedy
        gives 1 to the likeliest token, the first of equals. Raises BadLogits.
        """
        scores = self._penalized(logits, context).double()
        top = scores.amax(-1, keepdim=True)
        if not bool(top.isfinite().all()):
            raise _bad_logits(logits)
        if self.greedy:
            chosen = torch.from_numpy(scores.numpy().argmax(-1))  # numpy promises the first
            return torch.zeros_like(scores).scatter_(-1, chosen[:, None], 1.0)
        scores = (scores - top) / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k, -1).values[:, -1:]
            scores = scores.masked_fill(scores < least, -math.inf)
        if self.top_p < 1:
            scores = scores.masked_fill(~_nucleus(scores.softmax(-1), self.top_p), -math.inf)
        if self.min_p > 0:
            likely = scores.softmax(-1)
            few = likely < self.min_p * likely.amax(-1, keepdim=True)
            scores = scores.masked_fill(few, -math.inf)
        return scores.softmax(-1)

    def choose(self, logits: Tensor, context: Sequence[int], chance: torch.Generator) -> int:
        """The next token from logits [vocabulary]; greedy leaves `chance` as it is."""
        if self.greedy:
            scores = self._penalized(logits[None], context)[0].numpy()
            best = int(scores.argmax())
            if not math.isfinite(scores[best]):
                raise _bad_logits(logits)
            return best
        return draw(self.probabilities(logits[None], context)[0], chance)

    def _penalized(self, logits: Tensor, context: Sequence[int]) -> Tensor:
        if self.repetition_penalty == 1 or not context:
            return logits
        seen = torch.tensor([token for token in set(context) if token < logits.shape[-1]])
        scores = logits.double()
        old = scores[:, seen]
        new = torch.where(old < 0, old * self.repetition_penalty, old / self.repetition_penalty)
        return scores.index_copy(-1, seen, new)


def draw(probabilities: Tensor, generator: torch.Generator) -> int:
    """A token drawn from probabilities [vocabulary]; uses one number of the generator.

    The probabilities need not sum to 1. A token of probability 0 is never drawn.
    """
    below = probabilities.double().cumsum(-1)
    spot = torch.rand((), generator=generator, dtype=torch.float64) * below[-1]
    place = int(torch.searchsorted(below, spot, right=True))
    if place == len(below):  # rounding took the spot up to the whole mass
        place = int(torch.searchsorted(below, below[-1]))
    return place


def _nucleus(likely: Tensor, mass: float) -> Tensor:
    """Which tokens of likely [n, vocabulary] are needed for the mass, the likeliest first.

    Mostly a few: sorting the whole vocabulary would take longer than many a model.
    """
    vocabulary = likely.shape[-1]
    count = min(_NUCLEUS, vocabulary)
    while True:
        ordered, places = likely.topk(count, -1)
        kept = ordered.cumsum(-1) - ordered < mass
        if count == vocabulary or not bool(kept[:, -1].any()):
            return torch.zeros_like(likely, dtype=torch.bool).scatter_(-1, places, kept)
        count = min(8 * count, vocabulary)


def _check(name: str, value: float, holds: bool, expected: str) -> None:
    if not holds:
        raise WrongOption(
            f"{name} cannot be {value}",
            expected=expected,
            found=str(value),
            fix=f"leave {name} out, or give another value",
        )


def _bad_logits(logits: Tensor) -> BadLogits:
    nan = int(logits.isnan().sum())
    return BadLogits(
        "the model's logits name no next token",
        expected="finite logits",
        found=f"{nan} NaN of {logits.numel()}" if nan else "a largest logit that is infinite",
        fix="check the model: an overflow in float16 or a damaged weight makes such logits",
    )
