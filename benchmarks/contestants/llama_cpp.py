"""llama.cpp as a contestant, through the low-level interface of llama-cpp-python."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Told = Mapping[str, Any]

IMPORTS = ["llama_cpp"]
PACKAGES = ["llama-cpp-python"]
_KEEP = -1
# The names of llama.cpp's file types, LLAMA_FTYPE_*.
_TYPES = {"F32": 0, "Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15, "Q4_1, the source file": _KEEP}
_HEATS = {"F32": "float32", "Q8_0": "int8"}
CONTESTANTS: list[dict[str, Any]] = [
    {
        "name": f"llama.cpp {name}",
        "kind": "decoder",
        "heat": _HEATS.get(name, "int4"),
        "compute": "float32" if name == "F32" else "int8",
        "cache_bits": 16,
        "options": {"type": number},
    }
    for name, number in _TYPES.items()
]
ROOM = 512
"""Tokens that the cache has room for after the prompt."""


def prepare(options: Told, model: Told, out: Path) -> dict[str, float]:
    """Quantize the model's GGUF file from its own codes; bits are those of the file."""
    if model["gguf"] is None:
        raise NotImplementedError("this model has no GGUF file")
    source, made = Path(model["gguf"]), out / "model.gguf"
    if options["type"] == _KEEP:
        made.symlink_to(source)
    else:
        quantize(source, made, options["type"])
    bits = 8 * made.stat().st_size / model["parameters"]
    return {"bits": bits, "head_bits": bits}


def quantize(source: str | Path, made: Path, kind: int) -> None:
    """Write a GGUF file of another type."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.allow_requantize, settings.nthread = kind, True, 1
    names = str(source).encode(), str(made).encode()
    if llama_cpp.llama_model_quantize(*names, ctypes.byref(settings)):
        raise RuntimeError("llama.cpp could not quantize the file")


def load(options: Told, model: Told, path: Path, threads: int) -> LlamaCpp:
    """An engine of bench_worker."""
    return LlamaCpp(path / "model.gguf", threads)


class LlamaCpp:
    """A model, and a context for the shape of batch that is being decoded."""

    def __init__(self, file: Path, threads: int) -> None:
        import llama_cpp

        self.lib, self.threads = llama_cpp, threads
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), settings)
        if not self.model:
            raise RuntimeError("llama.cpp does not read its file")
        words = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(words)
        self.shape = (0, 0)
        self.context: Any = None
        self.length = 0

    def start(self, ids: Array) -> Array:
        self._prepare(*ids.shape)
        return self._run(ids)[0].argmax(-1)

    def step(self, tokens: Array) -> Array:
        return self._run(tokens[:, None])[0].argmax(-1)

    def logits(self, ids: Sequence[int]) -> Array:
        self._prepare(1, len(ids))
        return self._run(np.asarray([ids]), every=True)[:, 0]

    def _prepare(self, batch: int, length: int) -> None:
        """An empty cache for texts of this shape."""
        lib = self.lib
        if self.shape != (batch, length):
            if self.context is not None:
                lib.llama_free(self.context)
            settings = lib.llama_context_default_params()
            settings.n_ctx, settings.n_batch = batch * (length + ROOM), batch * max(length, 32)
            settings.n_ubatch, settings.n_seq_max = 512, batch
            settings.n_threads = settings.n_threads_batch = self.threads
            self.context = lib.llama_init_from_model(self.model, settings)
            self.shape = (batch, length)
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        self.length = 0

    def _run(self, ids: Array, every: bool = False) -> Array:
        """Logits [1, batch, vocabulary] of the last tokens, or [length, 1, ...] of every one."""
        lib, (batch, new) = self.lib, ids.shape
        given = lib.llama_batch_init(batch * new, 0, 1)
        wanted: list[int] = []
        for row in range(batch):
            for place in range(new):
                i = row * new + place
                given.token[i], given.pos[i] = int(ids[row, place]), self.length + place
                given.n_seq_id[i], given.seq_id[i][0] = 1, row
                given.logits[i] = every or place == new - 1
                if given.logits[i]:
                    wanted.append(i)
        given.n_tokens = batch * new
        failed = lib.llama_decode(self.context, given)
        if failed:
            raise RuntimeError(f"llama_decode failed with {failed}")
        found = [
            np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, i), (self.vocabulary,))
            for i in wanted
        ]
        rows = np.stack(found)
        lib.llama_batch_free(given)
        self.length += new
        return rows[:, None] if every else rows[None]
