"""A text that is being generated: its pieces as they come, and what there is to tell at the end."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from .stopping import StopText
from .tokenizer import TextStream


class Generation(list[int]):
    """The new token ids, an end token included; and what else there is to tell of them.

    text: what they say, without a stop string, "" where there is no tokenizer. stopped_by: "end"
    (an end token), "stop" (a stop string), "length" (max_new_tokens), "context" (the text fills
    the model's context) or "close" (nobody asked for more). prompt: how many tokens the prompt
    had. seconds: until the first new token, and from then on.
    """

    text: str = ""
    stopped_by: str = ""
    prompt: int = 0
    seconds: tuple[float, float] = (0.0, 0.0)

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second, apart from the first one, which takes the time of the prompt."""
        return (len(self) - 1) / self.seconds[1] if self.seconds[1] > 0 else 0.0

    @property
    def prompt_tokens_per_second(self) -> float:
        """Tokens of the prompt a second, until the first new token."""
        return self.prompt / self.seconds[0] if self.seconds[0] > 0 else 0.0


@dataclass(frozen=True)
class Piece:
    """One new token and the text that can be shown after it, which may be nothing yet."""

    token: int
    text: str


@dataclass
class Limits:
    """What ends a text: token ids, stop strings, or `room` tokens, for the reason given."""

    ends: Collection[int]
    stop: StopText
    room: int
    reason: str


class Stream:
    """A text under way: iterate for its pieces; `result` grows with it.

    With the last piece comes whatever text was held back, because it might have been the beginning
    of a stop string or half a character.
    """

    def __init__(
        self, tokens: Iterator[int], prompt: int, limits: Limits, text: TextStream | None
    ) -> None:
        self.result = Generation()
        self.result.prompt = prompt
        self._tokens, self._limits, self._text = tokens, limits, text
        self._begun = self._first = 0.0
        if limits.room == 0:
            self.result.stopped_by = limits.reason

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        result = self.result
        self._begun = self._begun or time.perf_counter()
        token = None if result.stopped_by else next(self._tokens, None)
        if token is None:
            self.close()
            raise StopIteration
        now = time.perf_counter()
        self._first = self._first or now
        result.append(token)
        result.seconds = (self._first - self._begun, now - self._first)
        if token in self._limits.ends:
            result.stopped_by = "end"
        elif len(result) >= self._limits.room:
            result.stopped_by = self._limits.reason
        shown = "" if self._text is None else self._shown(self._text, token)
        result.text += shown
        if result.stopped_by:
            self.close()
        return Piece(token, shown)

    def close(self) -> None:
        """End the text here; the decoder is free for another one."""
        self.result.stopped_by = self.result.stopped_by or "close"
        close = getattr(self._tokens, "close", None)
        if close is not None:
            close()

    def _shown(self, text: TextStream, token: int) -> str:
        """The text that can be shown after a token; a stop string makes it the last one."""
        result, stop = self.result, self._limits.stop
        shown = stop.add(text.add(token))
        if result.stopped_by and stop.found is None:
            shown += stop.add(text.rest())
        if stop.found is not None:
            result.stopped_by = "stop"
        elif result.stopped_by:
            shown += stop.rest()
        return shown
