"""Text to token ids and back, by the tokenizer files of a folder.

The files are those of a Hugging Face model: `tokenizer.json`, `tokenizer_config.json` and
`chat_template.jinja`. They are read by the package `tokenizers` alone, so that no model library
has to be loaded before the first token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from .ir.errors import CorruptFile, MissingExtra, PlanishError, SourceNotFound

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
_RUNTIME_ERRORS = (ArithmeticError, LookupError, TypeError, ValueError, RecursionError)
_INCOMPLETE = "\ufffd"
_IN_VIEW = 8

Message = Mapping[str, str]
"""{"role": "user", "content": "..."}"""


class NoChatTemplate(PlanishError):
    """A conversation for a model whose tokenizer has no form for one, or refuses this one."""


class Tokenizer:
    """The tokenizer of a folder.

    Raises SourceNotFound, CorruptFile, MissingExtra.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._inner = _load(self.folder / TOKENIZER)
        self._settings = read_json(self.folder / SETTINGS)
        self._template = _chat_template(self.folder, self._settings)

    @property
    def has_chat(self) -> bool:
        """Whether it can spell a conversation."""
        return self._template is not None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids; special: with what the model begins its texts with, if it does."""
        return list(self._inner.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._inner.decode(list(ids), skip_special_tokens=True)

    def spell_chat(self, messages: Sequence[Message]) -> str:
        """A conversation as the text after which the model answers; raises NoChatTemplate.

        It holds the special tokens already: encode it with special=False.
        """
        if self._template is None:
            raise NoChatTemplate(
                "the tokenizer has no chat template",
                where=str(self.folder),
                expected=f"{CHAT_TEMPLATE}, or chat_template in {SETTINGS}",
                fix="give the prompt as plain text (--raw)",
            )
        return _render(self._template, messages, _special_tokens(self._settings), self.folder)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file; raises CorruptFile."""
    if not file.is_file():
        return {}
    try:
        found: Any = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise CorruptFile(
            f"{file.name} is damaged", where=str(file), expected="JSON", found=str(error)
        ) from error
    if not isinstance(found, dict):
        raise CorruptFile(
            f"{file.name} is damaged",
            where=str(file),
            expected="a JSON object",
            found=type(found).__name__,
        )
    return cast("dict[str, Any]", found)


def _load(file: Path) -> Any:
    if not file.is_file():
        raise SourceNotFound(
            "the folder has no tokenizer",
            where=str(file),
            expected=TOKENIZER,
            fix="give token ids instead of text, or export from a folder that has a tokenizer",
        )
    try:
        import tokenizers
    except ImportError as error:
        raise MissingExtra(
            "turning text into tokens needs the package tokenizers",
            found=str(error),
            fix="pip install planish[hf]",
        ) from error
    try:
        loaded = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises no narrower class
        if type(error) is not Exception:
            raise
        raise CorruptFile(
            f"{TOKENIZER} is damaged",
            where=str(file),
            found=str(error),
            fix="copy the tokenizer's files again",
        ) from error
    # Encoders ship with a fixed length: it would cut texts without a word, and fill short ones.
    loaded.no_truncation()
    loaded.no_padding()
    return loaded


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / CHAT_TEMPLATE
    if file.is_file():
        return file.read_text("utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):  # several with names
        named = {entry["name"]: entry["template"] for entry in cast("list[Any]", found)}
        return named.get("default")
    return found


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... as text; a file may give each as an object with its content."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        text = cast("Any", value).get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _render(
    template: str, messages: Sequence[Message], tokens: Mapping[str, str], folder: Path
) -> str:
    import jinja2

    from .chat_template import render_chat

    try:
        return render_chat(template, messages, tokens)
    except (jinja2.TemplateError, *_RUNTIME_ERRORS) as error:
        raise NoChatTemplate(
            "the chat template cannot spell this conversation",
            where=str(folder),
            found=f"{type(error).__name__}: {error}",
            fix="give the prompt as plain text (--raw)",
        ) from error


class TextStream:
    """The text of tokens that come one by one; never a half character.

    `add` gives what a token adds, which is nothing while the bytes of a character are incomplete.
    before: the tokens that the text follows. Its last ones, and later those of the last piece,
    stay in view, because some tokenizers spell a token at the beginning of a text without the
    space that it has within one.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._shown = list(before[-_IN_VIEW:])
        if tokenizer.decode(self._shown).endswith(_INCOMPLETE):
            self._shown = []
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        """What the text grows by."""
        self._waiting.append(token)
        piece = self._piece()
        if not piece or piece.endswith(_INCOMPLETE):
            return ""
        self._shown, self._waiting = self._waiting, []
        return piece

    def rest(self) -> str:
        """What is left at the end: an incomplete character shows as U+FFFD."""
        piece, self._waiting = self._piece(), []
        return piece

    def _piece(self) -> str:
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode([*self._shown, *self._waiting])[len(before) :]
