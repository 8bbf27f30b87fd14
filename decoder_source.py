"""What the source of a model tells a text generator: special tokens, context, tokenizer files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from .ir.errors import MissingExtra
from .ir.program import Program
from .ir.read_hf_folder import import_transformers, quiet
from .tokenizer import CHAT_TEMPLATE, SETTINGS, TOKENIZER, Tokenizer, read_json

GENERATION = "generation_config.json"

_TOKENIZER_FILES = (
    TOKENIZER,
    SETTINGS,
    CHAT_TEMPLATE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)
_SLOW_TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_PROBE = "The  cost: 3,141.5 (naïve)\n\tx = [f(y) for y in z]  "
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")
_TOKEN_NAMES = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class DecoderSource:
    """Facts about a model's source, without the model.

    folder: where tokenizer files may lie. config, generation: as the model's config.json and
    generation_config.json have them.
    """

    folder: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    generation: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def of(cls, model: nn.Module | Program | str | Path | None) -> DecoderSource:
        """The facts about whatever `planish.trace` takes; empty where nothing is known.

        A module tells by its attributes `config` and `generation_config`, where it has them; a
        folder by its files; a GGUF file by what it was converted to.
        """
        if isinstance(model, (str, Path)):
            return cls._of_path(Path(model))
        config, generation = (
            _as_dict(getattr(model, name, None)) for name in ("config", "generation_config")
        )
        return cls(None, config, generation)

    @classmethod
    def _of_path(cls, path: Path) -> DecoderSource:
        if path.suffix == ".gguf":
            from .ir.read_gguf import gguf_settings

            path = gguf_settings(path)
        if not (path / "config.json").is_file():
            return cls()
        return cls(path, read_json(path / "config.json"), read_json(path / GENERATION))

    @property
    def context(self) -> int | None:
        """The most tokens that the model was made for; None where the source does not say."""
        for name in _CONTEXT_NAMES:
            found = self._named(name)
            if isinstance(found, int) and found > 0:
                return found
        return None

    def token_ids(self) -> dict[str, Any]:
        """bos_token_id, eos_token_id (one or several), pad_token_id, as far as known."""
        found = {name: self.generation.get(name, self._named(name)) for name in _TOKEN_NAMES}
        return {name: value for name, value in found.items() if value is not None}

    def copy_tokenizer(self, folder: Path) -> list[str]:
        """Write the tokenizer's files into a folder; returns their names, none if there is none.

        They are copied, unless there is no `tokenizer.json` or transformers, which knows more of
        some tokenizers than that file says, tokenizes otherwise: then it writes them.
        """
        if self.folder is None:
            return []
        present = [name for name in _TOKENIZER_FILES if (self.folder / name).is_file()]
        if TOKENIZER in present:
            for name in present:
                shutil.copyfile(self.folder / name, folder / name)
        elif not any(name in present for name in _SLOW_TOKENIZERS):
            return []
        theirs = _load_tokenizer(self.folder)
        if theirs is not None and not _agrees(theirs, folder):
            theirs.save_pretrained(str(folder))
        return sorted(name for name in _TOKENIZER_FILES if (folder / name).is_file())

    def _named(self, name: str) -> Any:
        """An entry of the configuration, or of the part of it that describes the text model."""
        if self.config.get(name) is not None:
            return self.config[name]
        text: Any = self.config.get("text_config")
        return text.get(name) if isinstance(text, Mapping) else None


def _as_dict(config: Any) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    return config.to_dict() if hasattr(config, "to_dict") else {}


def _load_tokenizer(source: Path) -> Any:
    """The folder's tokenizer as transformers has it, or None where that knows none."""
    try:
        transformers = import_transformers()
        with quiet(transformers):
            return transformers.AutoTokenizer.from_pretrained(
                str(source), local_files_only=True, trust_remote_code=False
            )
    except (MissingExtra, ImportError, ValueError, KeyError, OSError):
        return None


def _agrees(theirs: Any, folder: Path) -> bool:
    if not (folder / TOKENIZER).is_file():
        return False
    return Tokenizer(folder).encode(_PROBE) == list(theirs(_PROBE)["input_ids"])
