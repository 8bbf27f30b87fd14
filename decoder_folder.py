"""An exported decoder as a folder that generates text: what lies beside model.onnx, and its checks.

model.onnx, model.onnx.data   the decoder with its cache as inputs and outputs
planish.json                  the manifest; its section "decoder" describes the cache
tokenizer.json, ...           the tokenizer, where the source has one
generation_config.json        begin, end and padding tokens
genai_config.json             lets ONNX Runtime GenAI run the folder, where it can
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .codegen.bundle import MANIFEST
from .decoder_source import GENERATION, DecoderSource
from .genai_config import GENAI, genai_config, token_list, why_not_genai
from .ir.errors import PlanishError, SourceNotFound, TruncatedFile
from .tokenizer import TOKENIZER, read_json

FORMAT = 1
"""Of the section "decoder": raised when a folder comes out in a form that older readers misread."""

MODEL = "model.onnx"


class NotADecoderFolder(PlanishError):
    """A folder that holds no decoder with a KV cache exported by planish."""


class OtherVersion(PlanishError):
    """A decoder folder in the format of another version of planish."""


@dataclass(frozen=True)
class DecoderFolder:
    """What a decoder folder says of itself.

    cache: "shared" (past and present may be one preallocated buffer) or "growing". shapes: of each
    layer's cache, (kv heads, key width, value width). dtype: of the cache. mask: the input of ones
    over past and new tokens, if there is one. context: the most tokens of a text, None if nothing
    limits it. logits: of how many of the last positions, None for all. begin, ends: token ids.
    """

    path: Path
    cache: str
    shapes: tuple[tuple[int, int, int], ...]
    dtype: str
    mask: str | None
    context: int | None
    vocabulary: int
    logits: int | None
    begin: int | None
    ends: frozenset[int]

    @property
    def has_tokenizer(self) -> bool:
        """Whether text can be turned into tokens."""
        return (self.path / TOKENIZER).is_file()


def write_decoder_files(
    source: DecoderSource, folder: Path, section: Mapping[str, Any]
) -> dict[str, Any]:
    """Add to a folder with a decoder's model.onnx what generating text needs.

    section: the manifest's "decoder", as the target has written it. What is returned goes into
    the manifest: "decoder" with its format and the smaller of the graph's context and the
    source's, and "genai": its type, or why there is no genai_config.json.
    """
    limits = [limit for limit in (section.get("context"), source.context) if limit]
    told = {**section, "format": FORMAT, "context": min(limits, default=None)}
    tokens = source.token_ids()
    source.copy_tokenizer(folder)
    _write_json(folder / GENERATION, {**source.generation, **tokens})
    reason = why_not_genai(told)
    if reason is None:
        _write_json(folder / GENAI, genai_config(told, tokens, MODEL))
    return {"decoder": told, "genai": reason or "decoder"}


def read_decoder_folder(folder: str | Path) -> DecoderFolder:
    """Read and check the manifest of a decoder folder, and that its files are whole by size.

    Raises SourceNotFound, NotADecoderFolder, OtherVersion, CorruptFile, TruncatedFile.
    """
    path = Path(folder)
    manifest = _read_manifest(path)
    section = _decoder_section(path, manifest)
    _check_files(path, manifest.get("files", {}))
    tokens = read_json(path / GENERATION)
    begin = tokens.get("bos_token_id")
    try:
        return DecoderFolder(
            path=path,
            cache=str(section["cache"]),
            shapes=tuple(_shape(shape) for shape in section["shapes"]),
            dtype=str(section["dtype"]),
            mask=section["mask"],
            context=section["context"],
            vocabulary=int(section["vocabulary"]),
            logits=None if section["logits"] == "all" else int(section["logits"]),
            begin=None if begin is None else int(begin),
            ends=frozenset(token_list(tokens.get("eos_token_id"))),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise NotADecoderFolder(
            "the manifest's section 'decoder' is incomplete",
            where=str(path / MANIFEST),
            found=f"{type(error).__name__}: {error}",
            fix="export the model again",
        ) from error


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise SourceNotFound(
            f"there is no folder {path}",
            where=str(path),
            expected="a folder written by planish export --kv-cache",
            found="a file" if path.exists() else "nothing at this path",
            fix="check the path",
        )
    if not (path / MANIFEST).is_file():
        raise NotADecoderFolder(
            f"{path} was not exported by planish",
            where=str(path),
            expected=f"a folder with {MANIFEST}",
            found=", ".join(sorted(file.name for file in path.iterdir())[:8]) or "an empty folder",
            fix="export the model first: planish export SRC --kv-cache --out DIR",
        )
    return read_json(path / MANIFEST)


def _decoder_section(path: Path, manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    section: Any = manifest.get("decoder")
    if not isinstance(section, Mapping):
        raise NotADecoderFolder(
            f"{path} holds no decoder with a KV cache",
            where=str(path / MANIFEST),
            expected='target onnx, with a section "decoder"',
            found=f"target {manifest.get('target')}, without one",
            fix="export it again with --target onnx --kv-cache (in Python: kv_cache=True)",
        )
    if section.get("format") != FORMAT:
        raise OtherVersion(
            f"{path} is a decoder folder of another version of planish",
            where=str(path / MANIFEST),
            expected=f"format {FORMAT}",
            found=f"format {section.get('format')}, by planish {manifest.get('planish')}",
            fix="export the model again with this version",
        )
    return section


def _check_files(path: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """The model's own files; what else is missing is told when it is needed."""
    for name in sorted({MODEL, *(name for name in files if name.startswith(MODEL))}):
        file = path / name
        if not file.is_file():
            raise SourceNotFound(
                f"the folder lacks {name}",
                where=str(file),
                fix="copy the whole folder, or export the model again",
            )
        expected, found = files.get(name, {}).get("bytes"), file.stat().st_size
        if expected is not None and found != expected:
            raise TruncatedFile(
                f"{name} does not have the size it was written with",
                where=str(file),
                expected=f"{expected} bytes",
                found=f"{found} bytes",
                fix="copy the folder again, or export the model again",
            )


def _shape(value: Any) -> tuple[int, int, int]:
    heads, key, width = value
    return int(heads), int(key), int(width)


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")
