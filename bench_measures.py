"""What is measured: prompts, decoding after a prompt, batches, sentences of mixed lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .bench_roster import BenchModel, Contestant, Kind

SEED = 20


@dataclass(frozen=True)
class Measure:
    """One column.

    prompt: tokens of each text before what is timed (decode), or that are timed (prefill).
    new: tokens decoded in a round; rounds go on where the last one stopped. lengths: of the
    sentences that are encoded at once.
    """

    name: str
    kind: Kind
    prompt: int = 0
    batch: int = 1
    new: int = 0
    lengths: tuple[int, ...] = ()

    @property
    def unit(self) -> str:
        """Of `value`."""
        return "ms" if self.lengths else "tokens/s"

    def value(self, wall: float, work: int) -> float:
        """Of a round that took `wall` seconds."""
        return wall * 1e3 if self.lengths else work / wall

    def begin(self, text: Sequence[int]) -> list[dict[str, Any]]:
        """Orders before the rounds; the last one is like a round.

        text: int64 tokens to take prompts and sentences from.
        """
        if self.new:
            return [{"do": "start", "ids": self._prompts(text)}, self.round(text)]
        return [self.round(text)]

    def round(self, text: Sequence[int]) -> dict[str, Any]:
        """The order that is timed."""
        if self.lengths:
            return {"do": "encode", "sentences": sentences(text, self.lengths)}
        if self.new:
            return {"do": "steps", "count": self.new}
        return {"do": "start", "ids": self._prompts(text)}

    def _prompts(self, text: Sequence[int]) -> list[list[int]]:
        return [_piece(text, self.prompt, row) for row in range(self.batch)]

    def cost(self, model: BenchModel, row: Contestant) -> tuple[float, float]:
        """(bytes that must be read, operations of matrix products) of one round, at least.

        Every weight is read once a call, and the keys and values kept so far; of the tables only
        the output head is.
        """
        decoder = model.kind == "decoder"
        tokens = sum(self.lengths) or self.batch * (self.new or self.prompt)
        calls = self.new or 1
        weights = model.matmul * row.bits / 8 + decoder * model.table * row.head_bits / 8
        kept = row.cache_bits / 8 * model.cache * self.batch * (self.prompt if self.new else 0)
        heads = decoder * (tokens if self.new else self.batch) * model.table
        return calls * (weights + kept), 2.0 * (model.matmul * tokens + heads)


def sentences(text: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """One of each length."""
    return [_piece(text, length, row) for row, length in enumerate(lengths)]


def _piece(text: Sequence[int], length: int, row: int) -> list[int]:
    """`length` tokens from the row-th place on; the text goes round."""
    begin = (row * 97) % len(text)
    return [text[(begin + i) % len(text)] for i in range(length)]


def _decode(prompt: int, batch: int, new: int) -> Measure:
    return Measure(f"decode after {prompt}, batch {batch}", "decoder", prompt, batch, new)


def _prefill(prompt: int) -> Measure:
    return Measure(f"prefill {prompt}", "decoder", prompt)


MIXED = tuple(8 + (37 * i) % 121 for i in range(32))
"""32 lengths from 8 to 128 tokens."""

MEASURES = (
    *(_prefill(prompt) for prompt in (128, 512, 1024)),
    *(_decode(prompt, batch, 16) for batch in (1, 4, 16) for prompt in (128, 1024)),
    Measure("1 x 128", "encoder", lengths=(128,)),
    Measure("32 x 128", "encoder", lengths=(128,) * 32),
    Measure("32 mixed", "encoder", lengths=MIXED),
)
SHORT = (
    _prefill(512),
    _decode(128, 1, 16),
    Measure("1 x 128", "encoder", lengths=(128,)),
    Measure("32 mixed", "encoder", lengths=MIXED),
)
QUICK = (
    _prefill(32),
    _decode(16, 1, 4),
    _decode(16, 2, 4),
    Measure("1 x 16", "encoder", lengths=(16,)),
    Measure("4 mixed", "encoder", lengths=(4, 16, 9, 7)),
)
