"""Exported folders in onnxruntime as engines of `bench_worker`: decoders of one or many texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class OnnxTexts:
    """A decoder folder in onnxruntime: OnnxDecoder for one text, bound likewise for more."""

    def __init__(self, folder: Path, threads: int) -> None:
        from .decode_onnx import OnnxDecoder

        self.one = OnnxDecoder(folder, threads=threads)
        self.many: OnnxBatch | None = None

    def start(self, ids: Array) -> Array:
        self.one.rewind(0)
        self.many = None
        if len(ids) > 1:
            self.many = OnnxBatch(self.one, len(ids))
        return self._best(ids)

    def step(self, tokens: Array) -> Array:
        return self._best(tokens[:, None])

    def logits(self, ids: Sequence[int]) -> Array:
        self.one.rewind(0)
        parts = [self.one.advance(list(ids[i : i + 16])) for i in range(0, len(ids), 16)]
        return np.concatenate([part.numpy() for part in parts])

    def _best(self, ids: Array) -> Array:
        if self.many is not None:
            return self.many.run(ids).argmax(-1)
        return self.one.advance(ids[0].tolist(), last=1)[-1:].argmax(-1).numpy()


class OnnxBatch:
    """Several texts of one length in the session of a decoder."""

    def __init__(self, decoder: Any, batch: int) -> None:
        import onnxruntime as ort

        self.ort, self.batch, self.length = ort, batch, 0
        self.session, self.ports = decoder._session, decoder._ports
        self.rows, self.vocabulary = decoder.folder.logits, decoder.vocabulary
        self.binding: Any = self.session.io_binding()
        self.shared = decoder.folder.cache == "shared"
        self.buffers: list[Any] = []
        self._reserve(0)

    def run(self, ids: Array) -> Array:
        """Logits float32 [batch, vocabulary] of the last of int64 ids [batch, new]."""
        new, ports = ids.shape[1], self.ports
        total = self.length + new
        if self.shared and total > self.buffers[0].shape()[2]:
            self._reserve(2 * total)
        for name, value in zip(ports.cache.past, self.buffers, strict=True):
            self.binding.bind_ortvalue_input(name, value)
        self._bind(ports.ids.name, ids)
        if ports.mask is not None:
            self._bind(ports.mask.name, np.ones((self.batch, total)))
        logits = np.empty((self.batch, min(self.rows or new, new), self.vocabulary), np.float32)
        bound = self.ort.OrtValue.ortvalue_from_numpy(logits)
        self.binding.bind_ortvalue_output(ports.logits.name, bound)
        for name, value in zip(ports.cache.present, self.buffers, strict=True):
            if self.shared:
                self.binding.bind_ortvalue_output(name, value)
            else:
                self.binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(self.binding)
        if not self.shared:
            self.buffers = list(self.binding.get_outputs()[1:])
        self.length = total
        return logits[:, -1]

    def _bind(self, name: str, array: Array) -> None:
        value = self.ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, np.int64))
        self.binding.bind_ortvalue_input(name, value)

    def _reserve(self, places: int) -> None:
        """Buffers of `places` tokens, with what the old ones hold."""
        cache = self.ports.cache
        held = [value.numpy() for value in self.buffers] or [None] * len(cache.shapes)
        self.buffers = []
        for (heads, width), old in zip(cache.shapes, held, strict=True):
            wide = np.zeros((self.batch, heads, places, width), cache.dtype)
            if old is not None:
                wide[:, :, : self.length] = old[:, :, : self.length]
            self.buffers.append(self.ort.OrtValue.ortvalue_from_numpy(wide))


class OnnxEncoder:
    """An exported folder in onnxruntime."""

    def __init__(self, folder: Path, threads: int) -> None:
        from .codegen.run_onnx import OnnxModel

        self.model = OnnxModel(folder, threads=threads)

    def encode(self, ids: Array, mask: Array) -> Array:
        found = self.model(input_ids=ids, attention_mask=mask)
        return found[self.model.output_names[0]]
