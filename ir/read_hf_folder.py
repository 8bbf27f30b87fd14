"""A Hugging Face model folder (config.json and safetensors) as a module with mapped weights.

The parameters are memory-mapped where the file's dtype is kept, so a model costs memory only as
far as it is read. Needs the extra `hf`. Nothing is loaded by pickle, no code of the folder is run
and no hub is asked.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NoReturn, cast

import torch
from torch import nn

from .errors import (
    CorruptFile,
    MissingExtra,
    MissingTensor,
    SourceNotFound,
    TensorMismatch,
    UnsupportedCheckpoint,
)
from .read_safetensors import StoredTensor, locate_tensors, refuse_pickle

Attention = Literal["sdpa", "eager"]


def read_hf_folder(
    folder: str | Path, *, attention: Attention | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """The model of a folder, in eval mode, without a key-value cache, ties kept.

    attention: the form of its attention; by default the library's choice. dtype: of the weights;
    by default the one most of them are stored in, which copies nothing. The class is the one that
    the configuration's `architectures` names.

    Raises MissingExtra, SourceNotFound, PickleRefused, CorruptFile (and its kinds),
    UnsupportedCheckpoint, MissingTensor and TensorMismatch.
    """
    folder = Path(folder)
    settings = read_config(folder)
    stored = locate_tensors(folder)
    transformers = import_transformers()
    config = configuration(transformers, folder)
    found = model_class(transformers, config, settings, folder)
    options: dict[str, Any] = {"config": config, "dtype": dtype or _main_dtype(stored)}
    if attention is not None:
        options["attn_implementation"] = attention
    with quiet(transformers):
        model, report = found.from_pretrained(
            str(folder),
            **options,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    refuse_incomplete(str(folder), model, report)
    return prepare(model)


def prepare(model: nn.Module) -> nn.Module:
    """Inference form: eval mode, no cache, experts in a form that every runtime has.

    Grouped matmul, the usual form of expert layers, is exported as an op of its library's own.
    """
    config: Any = model.config
    config.use_cache = False
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    text.use_cache = False
    choice: Any = model
    if hasattr(choice, "set_experts_implementation") and choice._can_set_experts_implementation():
        choice.set_experts_implementation("batched_mm")
    return model.eval().requires_grad_(False)


def read_config(folder: Path, *, quantized: bool = False) -> dict[str, Any]:
    """The folder's config.json; raises SourceNotFound, CorruptFile or UnsupportedCheckpoint.

    quantized: whether it may tell of weights that are quantized already.
    """
    refuse_pickle(folder)
    file = folder / "config.json"
    if not file.is_file():
        raise SourceNotFound(
            f"{folder} is no model folder" if folder.is_dir() else f"no such folder: {folder}",
            where=str(folder),
            expected="a folder with config.json and safetensors files",
            found="no config.json" if folder.is_dir() else "nothing at this path",
            fix="check the path, or save the model there with save_pretrained",
        )
    try:
        settings: Any = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise CorruptFile(
            "config.json is damaged",
            where=str(file),
            expected="JSON",
            found=str(error),
            fix="copy or download the file again",
        ) from error
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise CorruptFile(
            "config.json does not describe a model",
            where=str(file),
            expected="a JSON object with 'model_type'",
            found=", ".join(map(str, list(cast("dict[str, Any]", settings))[:8]))
            if isinstance(settings, dict)
            else type(settings).__name__,
            fix="offer a folder written by save_pretrained",
        )
    settings = cast("dict[str, Any]", settings)
    _refuse_own_code(file, settings)
    if not quantized and settings.get("quantization_config"):
        refuse_quantized(file, settings)
    return settings


def import_transformers() -> ModuleType:
    """The transformers library; raises MissingExtra."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra(
            "reading this model needs transformers",
            found=str(error),
            fix="pip install planish[hf]",
        ) from error
    return transformers


@contextmanager
def quiet(transformers: ModuleType) -> Generator[None]:
    """No progress bars or loading reports: what is wrong is raised as an error instead."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _refuse_own_code(file: Path, settings: Mapping[str, Any]) -> None:
    if settings.get("auto_map"):
        raise UnsupportedCheckpoint(
            "the model's code lies in its own folder, and planish runs no code of a model folder",
            where=str(file),
            expected="an architecture that transformers has",
            found=f"auto_map: {settings['auto_map']}",
            fix="load the model yourself and pass the module to planish.trace",
        )


def refuse_quantized(
    file: Path, settings: Mapping[str, Any], known: Sequence[str] = ()
) -> NoReturn:
    """Raise UnsupportedCheckpoint; known: the methods that would have been read here."""
    how: Any = settings["quantization_config"]
    named = how.get("quant_method") if isinstance(how, Mapping) else None
    method = named or "an unnamed method"
    raise UnsupportedCheckpoint(
        f"the checkpoint is already quantized ({method})",
        where=str(file),
        expected="floating-point weights" + (f", or {', '.join(known)}" if known else ""),
        found=f"quantization_config with quant_method {method}",
        fix="offer the original checkpoint; planish quantizes it itself",
    )


def configuration(transformers: ModuleType, folder: Path) -> Any:
    """What transformers makes of config.json; raises UnsupportedCheckpoint."""
    try:
        with quiet(transformers):
            return transformers.AutoConfig.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    except (ValueError, TypeError, KeyError) as error:
        raise UnsupportedCheckpoint(
            "transformers does not accept the configuration",
            where=str(folder / "config.json"),
            found=str(error).strip().splitlines()[0] if str(error).strip() else repr(error),
            fix="use a newer transformers, or repair config.json",
        ) from error


def model_class(
    transformers: ModuleType, config: Any, settings: Mapping[str, Any], folder: Path
) -> Any:
    """The class that `architectures` names, else AutoModel; raises UnsupportedCheckpoint."""
    names = settings.get("architectures") or []
    if not names:
        return transformers.AutoModel
    found = getattr(transformers, str(names[0]), None)
    if found is None or not hasattr(found, "from_pretrained"):
        raise UnsupportedCheckpoint(
            f"transformers {transformers.__version__} has no model class {names[0]}",
            where=str(folder / "config.json"),
            expected="architectures: a class of transformers",
            found=f"{names[0]} (model_type {config.model_type})",
            fix="use a newer transformers, or pass the module to planish.trace",
        )
    return found


def _main_dtype(stored: Mapping[str, StoredTensor]) -> torch.dtype:
    """The floating-point dtype that most stored bytes have."""
    sizes: Counter[torch.dtype] = Counter()
    for place in stored.values():
        if place.dtype.is_floating_point:
            sizes[place.dtype] += place.stop - place.start
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def refuse_incomplete(where: str, model: nn.Module, report: Mapping[str, Any]) -> None:
    """Raise MissingTensor, TensorMismatch or CorruptFile for what a loader could not place."""
    kind = type(model).__name__
    missing = sorted(report["missing_keys"])
    if missing:
        raise MissingTensor(
            f"the checkpoint lacks {_listed(missing)}",
            where=where,
            expected=f"every parameter of {kind}, as config.json describes it",
            found=f"{len(missing)} missing; {len(report['unexpected_keys'])} stored ones unused",
            fix="check that config.json belongs to these weights",
        )
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, found, expected = mismatched[0]
        more = f" (and {len(mismatched) - 1} more)" if len(mismatched) > 1 else ""
        raise TensorMismatch(
            f"the tensor {name} has the wrong shape{more}",
            where=where,
            expected=f"{list(expected)}, as config.json says for {kind}",
            found=f"{list(found)} in the checkpoint",
            fix="check that config.json belongs to these weights",
        )
    if report["error_msgs"]:
        raise CorruptFile(
            "the checkpoint could not be loaded", where=where, found=report["error_msgs"][0]
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
