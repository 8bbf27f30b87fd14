"""What the demo measures: perplexity, divergence, throughput, latency, similarity."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .demo_models import Advance

SLICE, SLICES = 512, 2
PREFIX, DECODED = 128, 32
ROUNDS = 3
SENTENCE = 128
DECODE_FORM = f"{DECODED} tokens, one by one, after {PREFIX}, with a KV cache"
_BLOCK = 64
_SETTLE = 0.05  # seconds; the threads of the runtime that ran before spin for a while


@dataclass
class Row:
    """One line of the tables. Sizes are in bytes, speeds in tokens a second, times in seconds."""

    name: str
    forward: Callable[[Tensor, Any], Any]
    size: int
    seconds: float | None = None
    peak_memory: int | None = None
    timings: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    values: dict[str, float] = field(default_factory=dict[str, float])

    def timed(self, what: str, call: Callable[[], Tensor]) -> Tensor:
        """Call, and keep how long it took."""
        time.sleep(_SETTLE)
        begun = time.perf_counter()
        result = call()
        self.timings.setdefault(what, []).append(time.perf_counter() - begun)
        return result

    def seconds_of(self, what: str) -> float:
        """The median of the rounds."""
        return median(self.timings[what])


Step = tuple[int, int, str]


def measure_language(rows: list[Row], ids: Tensor) -> Iterator[Step]:
    """Fill the rows of a language model; the first one is the original. Yields progress.

    ids: int64[tokens] of the fixed text. Rounds are interleaved, so that a busy moment of the
    machine falls on all rows alike.
    """
    slices = [ids[None, i * SLICE : (i + 1) * SLICE] for i in range(SLICES)]
    steps, done = len(rows) * ROUNDS, 0
    for turn in range(ROUNDS):
        part = slices[turn % SLICES]
        reference: Tensor | None = None
        for row in rows:
            yield done, steps, row.name
            logits = row.timed("prefill", lambda row=row, part=part: row.forward(part, None)[0])
            reference = logits if reference is None else reference
            if turn < SLICES:
                loss, divergence = compare_logits(reference[0], logits[0], part[0])
                for key, value in (("loss", loss), ("kl", divergence)):
                    row.values[key] = row.values.get(key, 0.0) + value / SLICES
            logits, kept = row.forward(slices[0][:, :PREFIX], None)
            row.timed("decode", lambda row=row, a=logits, b=kept: decode(row.forward, a, b))
            done += 1
    for row in rows:
        row.values["perplexity"] = math.exp(row.values["loss"])
        row.values["prefill"] = SLICE / row.seconds_of("prefill")
        row.values["decode"] = DECODED / row.seconds_of("decode")
    yield done, steps, "done"


def _forward(row: Row, ids: Tensor) -> Tensor:
    return row.forward(ids, torch.ones_like(ids))


def decode(advance: Advance, logits: Tensor, kept: Any) -> Tensor:
    """Greedy decoding of DECODED tokens after a prefix, each from the KV cache kept so far."""
    text: list[Tensor] = []
    for _ in range(DECODED):
        text.append(logits[:, -1:].argmax(-1))
        logits, kept = advance(text[-1], kept)
    return torch.cat(text, 1)


def compare_logits(reference: Tensor, found: Tensor, ids: Tensor) -> tuple[float, float]:
    """Mean loss of the next token (nats) and mean KL(reference || found), in float64.

    reference, found: f32[length, vocabulary]; ids: int64[length].
    """
    loss = divergence = 0.0
    for start in range(0, len(ids), _BLOCK):
        block = slice(start, start + _BLOCK)
        expected = reference[block].double().log_softmax(-1)
        have = found[block].double().log_softmax(-1)
        divergence += float((expected.exp() * (expected - have)).sum())
        following = ids[start + 1 : start + 1 + _BLOCK]
        loss -= float(have[: len(following)].gather(-1, following[:, None]).sum())
    return loss / (len(ids) - 1), divergence / len(ids)


def measure_encoder(rows: list[Row], ids: Tensor, mask: Tensor) -> Iterator[Step]:
    """Fill the rows of an encoder; the first one is the original. Yields progress.

    ids, mask: int64[sentences, length].
    """
    steps = len(rows) * (1 + 4 * ROUNDS)
    done = 0
    reference: Tensor | None = None
    for row in rows:
        yield done, steps, f"sentences: {row.name}"
        found = mean_pooled(row.forward(ids, mask), mask)
        reference = found if reference is None else reference
        row.values["cosine"] = float(torch.cosine_similarity(reference, found, dim=-1).min())
        done += 1
    long = ids.reshape(1, -1)[:, :SENTENCE]
    for _ in range(4 * ROUNDS):
        for row in rows:
            yield done, steps, f"speed: {row.name}"
            row.timed("latency", lambda row=row: _forward(row, long))
            done += 1
    for row in rows:
        row.values["latency"] = row.seconds_of("latency")
    yield done, steps, "done"


def mean_pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean of the tokens that are not padding: [batch, length, width] to [batch, width]."""
    weight = mask[..., None].to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)
