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
from .onnx_cache import GrowingCache, OnnxCache, SharedCache
from .onnx_ports import DTYPES, read_ports

PIECE = 512
"""The most tokens of one run, which bounds the memory that a long prompt takes."""


class OnnxDecoder:
    """One text under way in an exported folder; a `Decoder`.

    Exported after the pass add_tree_mask it is a `TreeDecoder` too. extra: what the last run
    returned besides the logits and the cache, a row for each of its tokens. threads: of
    onnxruntime, 0 for its default. Raises what `read_decoder_folder` raises, CorruptFile where
    onnxruntime cannot read the model, NotADecoderFolder where it is not what the manifest says.
    """

    def __init__(self, folder: str | Path | DecoderFolder, *, threads: int = 0) -> None:
        described = folder if isinstance(folder, DecoderFolder) else read_decoder_folder(folder)
        self.folder = described
        self._session = _load(described.path / MODEL, threads)
        self._ports = read_ports(self._session, described)
        self._binding: Any = self._session.io_binding()
        self._begin, self._length = 0, 0
        self.extra: list[Tensor] = []
        self._cache: OnnxCache = (
            SharedCache(self._ports.cache, described.context)
            if described.cache == "shared"
            else GrowingCache(self._ports.cache)
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
            self.extra = [v[: max(0, len(v) - self._length + length)] for v in self.extra]
            self._length = length

    def advance_tree(self, tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
        """Logits [len(tokens), vocabulary] of a tree of tokens; see `TreeDecoder`.

        Raises NotADecoderFolder where the model has no tree mask, and what `advance` raises.
        """
        from .decode_program import tree_mask

        if self._ports.tree is None or self.folder.logits is not None:
            raise NotADecoderFolder(
                "the exported decoder cannot look at a tree of tokens",
                where=str(self.folder.path),
                expected="the inputs of add_tree_mask, and logits of all positions",
                found=f"{'a' if self._ports.tree else 'no'} tree mask, "
                f"logits of {self.folder.logits or 'all'} positions",
                fix="export it with add_tree_mask after insert_kv_cache in the recipe",
            )
        check_tokens(tokens, self.vocabulary)
        check_length(self._length, len(tokens), self.context)
        mask, depths = tree_mask(parents)
        return self._run(tokens, len(tokens), (mask.numpy(), depths.numpy()))

    def keep_branch(self, path: Sequence[int]) -> None:
        """Of the tree just added keep only the tokens `path` (root first) in the cache."""
        self._cache.select(self._begin, path)
        self.extra = [value[list(path)] for value in self.extra]
        self._length = self._begin + len(path)

    def _run(
        self, tokens: Sequence[int], kept: int, tree: tuple[np.ndarray, np.ndarray] | None = None
    ) -> Tensor:
        """One call of the session; the last `kept` rows of the logits it gives."""
        ports, count, total = self._ports, len(tokens), self._length + len(tokens)
        self._cache.bind(self._binding, self._length, total)
        self._bind_input(ports.ids, np.array([tokens]))
        if ports.mask is not None:
            self._bind_input(ports.mask, np.ones((1, total)))
        if ports.tree is not None:
            chain = np.tri(count, dtype=np.bool_), np.arange(count)
            for port, array in zip(ports.tree, tree or chain, strict=True):
                self._bind_input(port, array)
        rows = min(self.folder.logits or count, count)
        logits = np.empty((1, rows, self.vocabulary), DTYPES[ports.logits.type])
        value = ort.OrtValue.ortvalue_from_numpy(logits)
        self._binding.bind_ortvalue_output(ports.logits.name, value)
        for port in ports.extra:
            self._binding.bind_output(port.name, "cpu")
        self._session.run_with_iobinding(self._binding)
        self._cache.keep(self._binding)
        if ports.extra:
            outputs = self._binding.get_outputs()[-len(ports.extra) :]  # they are bound last
            self.extra = [torch.from_numpy(value.numpy())[0] for value in outputs]
        self._begin, self._length = self._length, total
        return torch.from_numpy(logits[0, rows - kept :]).float()

    def _bind_input(self, port: Any, array: np.ndarray) -> None:
        given = np.ascontiguousarray(array, DTYPES[port.type])
        self._binding.bind_ortvalue_input(port.name, ort.OrtValue.ortvalue_from_numpy(given))


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
