"""A GGUF file as a Hugging Face model folder, converted once and kept in a cache.

Unpacking a GGUF takes tens of seconds; its float32 weights as safetensors are memory-mapped in a
fraction of one. The cache is `$PLANISH_CACHE`, else the platform's place for caches; an entry is
keyed by the file's path, size, time of change and first bytes, is written aside and renamed, and
can be deleted at any time. Needs the extra `hf`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import platformdirs
import torch
from torch import nn

from .errors import MissingExtra, OutputNotWritable, UnsupportedCheckpoint
from .gguf_header import GgufHeader, read_gguf_header
from .read_hf_folder import Attention, import_transformers, quiet, read_hf_folder

_VERSION = 1  # of the cache's content: raise it when a conversion comes out differently
_PROBE_BYTES = 65536


def read_gguf(file: str | Path, *, attention: Attention | None = None) -> nn.Module:
    """The model of a GGUF file, float32, in eval mode, memory-mapped from the cache.

    attention: the form of its attention; by default the library's choice. Raises as `gguf_folder`
    and `read_hf_folder`.
    """
    return read_hf_folder(gguf_folder(file), attention=attention)


def gguf_folder(file: str | Path) -> Path:
    """The cached folder (safetensors, config.json, tokenizer) of a GGUF file, made if need be.

    Raises SourceNotFound, CorruptFile, TruncatedFile, MissingExtra, UnsupportedCheckpoint and
    OutputNotWritable (the cache).
    """
    file = Path(file).resolve()
    folder = cache_folder() / "gguf" / _key(file)
    if (folder / "config.json").is_file():
        return folder
    header = read_gguf_header(file)
    _make_writable(folder.parent)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as aside:
        whole = Path(aside) / "folder"
        _convert(file, header, whole)
        _publish(whole, folder)
    return folder


def gguf_settings(file: str | Path) -> Path:
    """A cached folder with config.json and the tokenizer of a GGUF file; its weights may lack.

    Raises as `gguf_folder`.
    """
    file = Path(file).resolve()
    whole = cache_folder() / "gguf" / _key(file)
    if (whole / "config.json").is_file():
        return whole
    folder = whole.with_name(f"{whole.name}-settings")
    if (folder / "config.json").is_file():
        return folder
    header = read_gguf_header(file)
    _make_writable(folder.parent)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as aside:
        made = Path(aside) / "folder"
        _convert_settings(file, header, made)
        _publish(made, folder)
    return folder


def cache_folder() -> Path:
    """Where planish keeps what it can make again: `$PLANISH_CACHE` or the platform's place."""
    chosen = os.environ.get("PLANISH_CACHE")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("planish"))


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputNotWritable(
            "the cache for converted models cannot be written",
            where=str(folder),
            found=str(error),
            fix="set PLANISH_CACHE to a folder that can be",
        ) from error


def _key(file: Path) -> str:
    if not file.is_file():
        read_gguf_header(file)  # raises the error that says so
    state = file.stat()
    with file.open("rb") as stream:
        first = stream.read(_PROBE_BYTES)
    identity = f"{_VERSION} {file} {state.st_size} {state.st_mtime_ns}".encode()
    return f"{file.stem}-{hashlib.sha256(identity + first).hexdigest()[:16]}"


def _publish(whole: Path, folder: Path) -> None:
    try:
        whole.rename(folder)
    except OSError:
        # Another process finished the same conversion first, or left a broken entry behind.
        if (folder / "config.json").is_file():
            return
        shutil.rmtree(folder)
        whole.rename(folder)


def _convert(file: Path, header: GgufHeader, out: Path) -> None:
    transformers = import_transformers()
    with quiet(transformers), _reading(file, header):
        config = transformers.AutoConfig.from_pretrained(str(file.parent), **_where(file))
        model = _auto_class(transformers, config).from_pretrained(
            str(file.parent), **_where(file), config=config, dtype=torch.float32
        )
        _drop_quantization_marks(model)
        model.save_pretrained(str(out))
        _save_tokenizer(transformers, file, out)


def _convert_settings(file: Path, header: GgufHeader, out: Path) -> None:
    transformers = import_transformers()
    with quiet(transformers), _reading(file, header):
        config = transformers.AutoConfig.from_pretrained(str(file.parent), **_where(file))
        found = _auto_class(transformers, config)
        with torch.device("meta"):
            make: Any = found if hasattr(found, "config_class") else found.from_config
            model: Any = make(config)
        config.architectures = [type(model).__name__]
        config.save_pretrained(str(out))
        transformers.GenerationConfig.from_model_config(config).save_pretrained(str(out))
        _save_tokenizer(transformers, file, out)


def _where(file: Path) -> dict[str, Any]:
    return {"gguf_file": file.name, "local_files_only": True}


@contextmanager
def _reading(file: Path, header: GgufHeader) -> Generator[None]:
    """Errors of the library's reader as ours."""
    try:
        yield
    except ImportError as error:
        raise MissingExtra(
            "reading a GGUF file needs transformers, gguf and accelerate",
            where=str(file),
            found=str(error).strip().splitlines()[0],
            fix="pip install planish[hf]",
        ) from error
    except (ValueError, KeyError, NotImplementedError) as error:
        raise _unsupported(file, header, error) from error


def _auto_class(transformers: ModuleType, config: Any) -> Any:
    """The class with a head that fits the configuration: the language model where there is one."""
    named = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    if named is not None:
        return named
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM):
        if type(config) in auto._model_mapping:
            return auto
    return transformers.AutoModel


def _drop_quantization_marks(model: Any) -> None:
    """The weights are plain float32 by now, but the model still says it cannot be saved."""
    model.hf_quantizer = None
    for name in ("quantization_method", "is_quantized"):
        if hasattr(model, name):
            setattr(model, name, None if name == "quantization_method" else False)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _save_tokenizer(transformers: ModuleType, file: Path, out: Path) -> None:
    """Keep the tokenizer too; some GGUF files have none that transformers reads, and need none."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(file.parent), gguf_file=file.name, local_files_only=True
        )
    except (ValueError, KeyError, NotImplementedError, OSError):
        return
    tokenizer.save_pretrained(str(out))


def _unsupported(file: Path, header: GgufHeader, error: Exception) -> UnsupportedCheckpoint:
    return UnsupportedCheckpoint(
        f"{file.name} holds a {header.architecture!r} model, which cannot be converted",
        where=str(file),
        expected="an architecture and tensor types that transformers reads from GGUF",
        found=str(error).strip().splitlines()[0] if str(error).strip() else repr(error),
        fix="offer the model as a folder with config.json and safetensors",
    )
