"""Calibration inputs for a program: batches as given, from a file of tensors, or from plain text.

A text becomes slices of equal length, evenly spaced over it, each with the special tokens that the
model begins and ends its texts with.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .decoder_source import DecoderSource
from .ir.errors import SourceNotFound, WrongInput
from .ir.program import Program
from .ir.read_safetensors import read_safetensors
from .tokenizer import Tokenizer

SAMPLES, LENGTH = 128, 512
TENSORS = ".safetensors"
_LEAST = 8


@dataclass(frozen=True)
class Slicing:
    """How a text is cut: how many slices, of how many tokens each (special tokens included)."""

    samples: int = SAMPLES
    length: int = LENGTH

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < _LEAST:
            raise WrongInput(
                "a calibration text cannot be cut like this",
                expected=f"at least 1 slice of at least {_LEAST} tokens",
                found=f"{self.samples} slices of {self.length} tokens",
                fix=f"for example {SAMPLES} slices of {LENGTH}",
            )


class Flat(list[Any]):
    """A batch that is laid out flat already, as `Program.flatten_inputs` does."""


def calibration_batches(
    program: Program,
    given: Iterable[Any] | str | Path | None,
    source: DecoderSource | None = None,
    slicing: Slicing | None = None,
) -> list[Flat]:
    """Flat inputs of the program from batches, or from a file of tensors or text.

    given: batches, each a tensor, a tuple of positional inputs or a mapping of keyword inputs; or
    a `.safetensors` file with tensors `0.input_ids`, `1.input_ids`, ...; or a text file, for which
    source must know the tokenizer. Raises WrongInput, SourceNotFound and the readers' errors.
    """
    if given is None:
        return []
    if not isinstance(given, (str, Path)):
        return [flat_batch(program, batch) for batch in given]
    file = Path(given)
    if not file.is_file():
        raise SourceNotFound(
            f"there is no calibration file {file}", where=str(file), fix="check the path"
        )
    if file.suffix == TENSORS:
        return [flat_batch(program, batch) for batch in read_tensor_batches(file)]
    return text_batches(file, program, source or DecoderSource(), slicing or Slicing())


def text_batches(
    file: Path, program: Program, source: DecoderSource, slicing: Slicing
) -> list[Flat]:
    """Slices of a text as flat inputs of a program that takes token ids (and a mask)."""
    names = [spec.name for spec in program.input_specs if spec.is_tensor]
    if set(names) - {"input_ids", "attention_mask"} or "input_ids" not in names:
        raise WrongInput(
            "this model does not take a text alone",
            where=str(file),
            expected="inputs input_ids and attention_mask",
            found=", ".join(names),
            fix=f"give its inputs as tensors, in a {TENSORS} file",
        )
    length = min(slicing.length, source.context or slicing.length)
    slicing = Slicing(slicing.samples, length)
    flat: list[Flat] = []
    for ids in slices(_tokenizer(source, str(file)), _read_text(file), str(file), slicing):
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs = [made.get(spec.name, spec.constant) for spec in program.input_specs]
        flat.append(Flat(inputs))
    return flat


def _read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise WrongInput(
            "the calibration file is neither tensors nor text",
            where=str(file),
            expected=f"a {TENSORS} file, or text in UTF-8",
            found=str(error),
            fix="offer a plain text like those that the model will see",
        ) from error


def read_tensor_batches(file: Path) -> list[dict[str, Tensor]]:
    """Batches from safetensors: tensors named `0.input_ids`, `1.input_ids`, ...; WrongInput."""
    batches: dict[int, dict[str, Tensor]] = {}
    for name, tensor in read_safetensors(file).items():
        number, dot, key = name.partition(".")
        if not dot or not number.isdigit():
            raise WrongInput(
                f"the calibration tensor {name!r} does not say which batch it belongs to",
                where=str(file),
                expected="names such as 0.input_ids and 0.attention_mask",
                found=name,
                fix="put the number of the batch and a dot before the name of the input",
            )
        batches.setdefault(int(number), {})[key] = tensor
    return [batches[number] for number in sorted(batches)]


def slices(tokenizer: Tokenizer, text: str, where: str, slicing: Slicing) -> list[Tensor]:
    """Token ids int64 [1, length] of evenly spaced slices; fewer where the text is short.

    Raises WrongInput if the text is empty or does not fill one slice.
    """
    before, after = _special_tokens(tokenizer)
    inner = slicing.length - len(before) - len(after)
    tokens = tokenizer.encode(text, special=False)
    count = min(slicing.samples, len(tokens) // inner)
    if count == 0:
        raise WrongInput(
            "the calibration text is too short" if tokens else "the calibration text is empty",
            where=where,
            expected=f"at least {inner} tokens, better {inner * slicing.samples}",
            found=f"{len(tokens)} tokens",
            fix="offer a longer text, or shorter slices (--calibration-length)",
        )
    starts = [(len(tokens) // inner - 1) * i // max(count - 1, 1) * inner for i in range(count)]
    return [torch.tensor([[*before, *tokens[s : s + inner], *after]]) for s in starts]


def _special_tokens(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    plain, dressed = (tokenizer.encode("a", special=special) for special in (False, True))
    for start in range(len(dressed) - len(plain) + 1):
        if dressed[start : start + len(plain)] == plain:
            return dressed[:start], dressed[start + len(plain) :]
    return [], []


def _tokenizer(source: DecoderSource, where: str) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        if not source.copy_tokenizer(Path(folder)):
            raise WrongInput(
                "a calibration text needs the model's tokenizer, and none is known",
                where=where,
                expected="a model folder with tokenizer.json, or a GGUF file",
                found=str(source.folder or "a model without a folder"),
                fix="tokenize the text yourself and pass calibration=[(ids,), ...]",
            )
        return Tokenizer(folder)


def flat_batch(program: Program, batch: Any) -> Flat:
    """One calibration batch as flat inputs; raises WrongInput."""
    if isinstance(batch, Flat):
        return batch
    if isinstance(batch, Tensor):
        batch = (batch,)
    if isinstance(batch, Mapping):
        return Flat(program.flatten_inputs((), dict(batch)))
    if not isinstance(batch, (tuple, list)):
        raise WrongInput(
            "a calibration batch is not an input of the model",
            expected="a tensor, a tuple of positional inputs or a mapping of keyword inputs",
            found=type(batch).__name__,
            fix="for example calibration=[(ids,), (ids2,)]",
        )
    return Flat(program.flatten_inputs(tuple(batch), {}))
