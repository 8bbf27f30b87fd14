"""Generate text with a decoder: from a prompt to tokens, one by one, until something ends it.

generator = Generator("out/")
generator.generate([1, 15, 7], max_new_tokens=12)          # token ids
generator.generate("Once upon a time", stop=["\\n"]).text
for piece in generator.stream("Once upon a time", temperature=0.8, seed=1):
    print(piece.text, end="", flush=True)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, overload

from torch import Tensor

from .check_text import check_length, check_tokens
from .decoder import Decoder
from .decoder_folder import DecoderFolder, read_decoder_folder
from .generation import Generation, Limits, Stream
from .ir.errors import MissingExtra, UnknownOption, WrongInput, WrongOption
from .sampling import Sampling
from .stopping import StopText
from .tokenizer import Message, TextStream, Tokenizer

if TYPE_CHECKING:
    from .speculate import Drafter, Statistics

Prompt = str | Sequence[int] | Tensor
"""Text (where there is a tokenizer) or token ids: a sequence, or an integer tensor [length] or
[1, length]."""

MAX_NEW_TOKENS = 256


class SamplingOptions(TypedDict, total=False):
    """The fields of `Sampling`, as keywords."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None


class Generator:
    """Generates with a decoder folder, or with any `Decoder`.

    decoder: the folder of `planish export --kv-cache`, or a decoder. tokenizer: by default the
    folder's, where it has one. begin, ends: the token that an empty prompt becomes, and those
    that end a text; by default the folder's. drafter: proposes tokens, which the decoder then
    checks many at a time; greedy text stays the same token for token. threads: of onnxruntime, 0
    for its default. One text at a time. Raises what `read_decoder_folder` and `OnnxDecoder` raise.
    """

    def __init__(
        self,
        decoder: str | Path | Decoder,
        *,
        tokenizer: Tokenizer | None = None,
        begin: int | None = None,
        ends: Collection[int] | None = None,
        drafter: Drafter | None = None,
        threads: int = 0,
    ) -> None:
        if isinstance(decoder, (str, Path)):
            folder = read_decoder_folder(decoder)
            begin = folder.begin if begin is None else begin
            ends = folder.ends if ends is None else ends
            if tokenizer is None and folder.has_tokenizer:
                tokenizer = Tokenizer(folder.path)
            decoder = _onnx_decoder(folder, threads)
        self.decoder, self.tokenizer = decoder, tokenizer
        self.begin, self.ends = begin, frozenset(ends or ())
        self.drafter = drafter
        self.statistics: Statistics | None = None
        self._latest: Stream | None = None

    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = ...,
        stop: Sequence[str] = ...,
        **sampling: Unpack[SamplingOptions],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: Tensor,
        *,
        max_new_tokens: int = ...,
        stop: Sequence[str] = ...,
        **sampling: Unpack[SamplingOptions],
    ) -> Generation | list[Generation]: ...

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        stop: Sequence[str] = (),
        **sampling: Unpack[SamplingOptions],
    ) -> Generation | list[Generation]:
        """The tokens that follow a prompt, as a list of ids with `text` and more; see `Generation`.

        prompt: text or token ids. A tensor of several rows gives a list of generations, one after
        the other, each as if it were alone. Greedy, unless a temperature is given; sampling: the
        fields of `Sampling`. stop: strings that end the text. The text ends before it exceeds the
        context.

        Raises WrongInput (an empty prompt for a model without a begin token, a token beyond the
        vocabulary, text without a tokenizer), TextTooLong (the prompt alone exceeds the context),
        WrongOption, UnknownOption, BadLogits.
        """
        rows: list[Any] = [prompt]
        if isinstance(prompt, Tensor) and prompt.dim() == 2 and len(prompt) > 1:
            rows = list(prompt)
        found: list[Generation] = []
        for row in rows:
            stream = self.stream(row, max_new_tokens=max_new_tokens, stop=stop, **sampling)
            for _ in stream:
                pass
            found.append(stream.result)
        return found[0] if len(found) == 1 else found

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        stop: Sequence[str] = (),
        **sampling: Unpack[SamplingOptions],
    ) -> Stream:
        """As `generate` for one prompt, but an iterator of `Piece`s, computed when asked for.

        A stream that is not at its end is closed when the next one begins.
        """
        unknown = set(sampling) - set(SamplingOptions.__annotations__)
        if unknown:
            raise UnknownOption.named(min(unknown), SamplingOptions.__annotations__, "sampling")
        if max_new_tokens < 0:
            raise WrongOption(
                f"max_new_tokens cannot be {max_new_tokens}", expected="0 or more tokens"
            )
        stops = StopText(stop)
        if stop and self.tokenizer is None:
            raise _no_tokenizer("looking for stop strings")
        ids = self.prompt_ids(prompt)
        room, reason = max_new_tokens, "length"
        if self.decoder.context is not None and len(ids) + room > self.decoder.context:
            room, reason = self.decoder.context - len(ids), "context"
        if self._latest is not None:
            self._latest.close()
        text = None if self.tokenizer is None else TextStream(self.tokenizer, ids)
        limits = Limits(self.ends, stops, room, reason)
        self._latest = Stream(self._tokens(ids, Sampling(**sampling), room), len(ids), limits, text)
        return self._latest

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """A prompt as token ids, checked; raises WrongInput and TextTooLong."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise _no_tokenizer("a prompt of text")
            ids = self.tokenizer.encode(prompt)
        else:
            ids = _token_ids(prompt)
        if not ids:
            if self.begin is None:
                raise WrongInput(
                    "the prompt is empty, and the model has no token that begins a text",
                    expected="one token or more",
                    found="none",
                    fix="give a prompt",
                )
            ids = [self.begin]
        check_tokens(ids, self.decoder.vocabulary)
        check_length(0, len(ids), self.decoder.context)
        return ids

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """A conversation as token ids, after which the model answers; raises NoChatTemplate."""
        if self.tokenizer is None:
            raise _no_tokenizer("a conversation")
        return self.tokenizer.encode(self.tokenizer.spell_chat(messages), special=False)

    def _tokens(self, ids: list[int], sampling: Sampling, count: int) -> Iterator[int]:
        """The new tokens, at most `count`; here a drafter comes in."""
        self.decoder.rewind(0)
        if self.drafter is None:
            return plain_tokens(self.decoder, ids, sampling, count)
        from .speculate import Statistics, speculative

        self.statistics = Statistics()
        return speculative(
            self.decoder,
            self.drafter,
            ids,
            sampling,
            count,
            stop=self.ends,
            statistics=self.statistics,
        )


def plain_tokens(
    decoder: Decoder, ids: Sequence[int], sampling: Sampling, count: int
) -> Iterator[int]:
    """Up to `count` tokens that follow the text `ids`, each from a call of the decoder.

    The decoder's cache must be empty. A token is computed only when it is asked for.
    """
    text, chance = list(ids), sampling.generator()
    new = text
    while len(text) - len(ids) < count:
        logits = decoder.advance(new, last=1)
        token = sampling.choose(logits[-1], text, chance)
        text.append(token)
        yield token
        new = [token]


def _onnx_decoder(folder: DecoderFolder, threads: int) -> Decoder:
    try:
        from .decode_onnx import OnnxDecoder
    except ModuleNotFoundError as missing:
        raise MissingExtra(
            "running a decoder folder needs onnxruntime",
            found=str(missing),
            fix="pip install 'planish[onnx]'",
        ) from missing
    return OnnxDecoder(folder, threads=threads)


def _token_ids(prompt: Any) -> list[int]:
    """A list of ints from a sequence or an array of integers [length] or [1, length]."""
    shape = tuple(getattr(prompt, "shape", (len(prompt),)))
    if len(shape) == 2 and shape[0] == 1:
        prompt, shape = prompt[0], shape[1:]
    values: list[Any] = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in values)
    if len(shape) != 1 or not whole:
        kind = getattr(prompt, "dtype", "")
        raise WrongInput(
            "a prompt is one text",
            expected="a string, token ids as whole numbers, or an integer tensor [length]",
            found=f"{type(prompt).__name__} {kind} {list(shape)}",
            fix="use a tensor of whole numbers, or call generate once for each text",
        )
    return values


def _no_tokenizer(what: str) -> WrongInput:
    return WrongInput(
        f"{what} needs a tokenizer, and there is none",
        expected="tokenizer.json in the folder",
        fix="give token ids, or export from a folder or file that has a tokenizer",
    )
