"""A decoder folder in plain onnxruntime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors  # pyright: ignore
from torch import Tensor

from .check_text import check_length, check_tokens
from .decoder_folder import MODEL, DecoderFolder, NotADecoderFolder, read_decoder_folder
from .ir.errors import CorruptFile, WrongInput
from .onnx_cache import CachePorts, GrowingCache, OnnxCache, SharedCache

MASK = "attention_mask"
"""Ones over past and new tokens, for a model captured with a padding mask."""

PIECE = 512
"""The most tokens of one run, which bounds the memory that a long prompt takes."""

_DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}


class OnnxDecoder:
    """One text under way in an exported folder; a `Decoder`.

    threads: of onnxruntime, 0 for its default. Raises what `read_decoder_folder` raises, and
    CorruptFile where onnxruntime cannot read the model.
    """

    def __init__(self, folder: str | Path | DecoderFolder, *, threads: int = 0) -> None:
        described = folder if isinstance(folder, DecoderFolder) else read_decoder_folder(folder)
        self.folder = described
        self._session = _load(described.path / MODEL, threads)
        self._ids, self._mask, self._logits, ports = _ports(self._session, described)
        self._binding: Any = self._session.io_binding()
        self._length = 0
        self._cache: OnnxCache = (
            SharedCache(ports, described.context)
            if described.cache == "shared"
            else GrowingCache(ports)
        )

    @property
    def vocabulary(self) -> int:
        """How many tokens the logits tell apart."""
        return self.folder.vocabulary

    @property
    def context(self) -> int | None:
        """The most tokens that a text may have; None where nothing limits it."""
        return self.folder.context

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._length

    def advance(self, tokens: Sequence[int], last: int | None = None) -> Tensor:
        """Append tokens; logits [min(last, len(tokens)), vocabulary] float32 of the last ones.

        Long texts go in pieces, and where the folder keeps the logits of few positions only,
        shorter ones. Raises TextTooLong and WrongInput before anything is changed.
        """
        check_tokens(tokens, self.vocabulary)
        check_length(self._length, len(tokens), self.context)
        wanted = len(tokens) if last is None else min(last, len(tokens))
        rows = [
            self._run(tokens[start:stop], kept)
            for start, stop, kept in _pieces(len(tokens), wanted, self.folder.logits or PIECE)
        ]
        kept_rows = [row for row in rows if len(row)]
        if len(kept_rows) == 1:
            return kept_rows[0]
        return torch.cat(kept_rows) if kept_rows else torch.empty(0, self.vocabulary)

    def rewind(self, length: int) -> None:
        """Forget everything after the first `length` tokens; raises WrongInput."""
        if not 0 <= length <= self._length:
            raise WrongInput(
                "a text can only be rewound to a beginning of itself",
                expected=f"0 to {self._length} tokens",
                found=str(length),
            )
        if length < self._length:
            self._cache.rewind(length)
            self._length = length

    def _run(self, tokens: Sequence[int], kept: int) -> Tensor:
        count, total = len(tokens), self._length + len(tokens)
        self._cache.bind(self._binding, self._length, total)
        self._bind_input(self._ids.name, np.array([tokens], _DTYPES[self._ids.type]))
        if self._mask is not None:
            self._bind_input(self._mask.name, np.ones((1, total), _DTYPES[self._mask.type]))
        rows = min(self.folder.logits or count, count)
        logits = np.empty((1, rows, self.vocabulary), _DTYPES[self._logits.type])
        self._binding.bind_ortvalue_output(
            self._logits.name, ort.OrtValue.ortvalue_from_numpy(logits)
        )
        self._session.run_with_iobinding(self._binding)
        self._cache.keep(self._binding)
        self._length = total
        return torch.from_numpy(logits[0, rows - kept :]).float()

    def _bind_input(self, name: str, array: np.ndarray) -> None:
        self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))


def _pieces(count: int, wanted: int, rows: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, wanted rows) of the runs, where one run gives at most `rows` rows."""
    found: list[tuple[int, int, int]] = []
    stop = count
    while stop > 0:
        start = max(0, stop - (PIECE if wanted <= rows else rows))
        kept = min(wanted, stop - start, rows)
        found.append((start, stop, kept))
        wanted -= kept
        stop = start
    return reversed(found)


def _load(file: Path, threads: int) -> ort.InferenceSession:
    broken = (ort_errors.InvalidProtobuf, ort_errors.InvalidGraph, ort_errors.Fail)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only
    try:
        return ort.InferenceSession(file, options)
    except broken as error:
        raise CorruptFile(
            "onnxruntime cannot read the model",
            where=str(file),
            found=str(error).strip().splitlines()[0],
            fix="copy the folder again, or export the model again",
        ) from error


def _ports(session: ort.InferenceSession, told: DecoderFolder) -> tuple[Any, Any, Any, CachePorts]:
    """The inputs of the ids and of the mask, if there is one, the logits, and the cache."""
    inputs = {port.name: port for port in session.get_inputs()}
    mask = inputs.pop(told.mask or MASK, None)
    ids, *past = inputs.values()
    logits, *present = session.get_outputs()
    layers = len(told.shapes)
    if len(past) != 2 * layers or len(present) != 2 * layers or (told.mask and mask is None):
        raise NotADecoderFolder(
            "the model does not have the inputs and outputs that the manifest describes",
            where=str(told.path / MODEL),
            expected=f"token ids, {2 * layers} of the cache, mask {told.mask}",
            found=f"inputs {', '.join(inputs)}; outputs {1 + len(present)}",
            fix="export the model again",
        )
    shapes = [(heads, width) for heads, *widths in told.shapes for width in widths]
    ports = CachePorts(
        [port.name for port in past],
        [port.name for port in present],
        shapes,
        _DTYPES[past[0].type] if past else np.float32,
    )
    return ids, mask, logits, ports
