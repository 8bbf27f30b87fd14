"""Eager PyTorch and Inductor as contestants: the model as transformers runs it, float32.

Imports nothing of planish, so that the peers' environment can build on it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Told = Mapping[str, Any]

IMPORTS = ["torch", "transformers.models.auto.modeling_auto"]
PACKAGES = ["torch", "transformers"]
CONTESTANTS: list[dict[str, Any]] = [
    {"name": "eager", "kind": "decoder", "heat": "baseline"},
    {"name": "Inductor", "kind": "decoder", "options": {"compile": True}},
    {"name": "eager", "kind": "encoder", "heat": "baseline"},
    {"name": "Inductor", "kind": "encoder", "options": {"compile": True}},
]


def prepare(options: Told, model: Told, out: Path) -> None:
    """The folder itself is loaded: a link to its files."""
    for file in Path(model["folder"]).iterdir():
        if file.suffix in (".json", ".safetensors"):
            (out / file.name).symlink_to(file.resolve())


def load(options: Told, model: Told, path: Path, threads: int) -> Any:
    """An engine of bench_worker."""
    import torch

    torch.set_num_threads(threads)
    module = read_model(model, path)
    made = TorchDecoderEngine if model["kind"] == "decoder" else TorchEncoderEngine
    return made(module, bool(options.get("compile")))


def read_model(model: Told, path: Path, **more: Any) -> Any:
    """The module of transformers, float32, in eval mode."""
    import torch
    import transformers

    decoder = model["kind"] == "decoder"
    auto = transformers.AutoModelForCausalLM if decoder else transformers.AutoModel
    return auto.from_pretrained(path, **{"dtype": torch.float32, **more}).eval()


class TorchDecoderEngine:
    """transformers with its own cache. compiled: Inductor, one graph for all lengths."""

    def __init__(self, module: Any, compiled: bool) -> None:
        import torch

        self.torch = torch
        self.cache: Any = None
        known = inspect.signature(module.forward).parameters
        self.last: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self.module = module
        self.call: Any = torch.compile(module, dynamic=True) if compiled else module

    def start(self, ids: Array) -> Array:
        self.cache = None
        return self._next(ids)

    def step(self, tokens: Array) -> Array:
        return self._next(tokens[:, None])

    def logits(self, ids: Sequence[int]) -> Array:
        with self.torch.inference_mode():
            tokens = self.torch.tensor([list(ids)])
            return self.module(tokens, use_cache=False).logits[0].float().numpy()

    def _next(self, ids: Array) -> Array:
        with self.torch.inference_mode():
            tokens = self.torch.from_numpy(np.ascontiguousarray(ids))
            found = self.call(tokens, past_key_values=self.cache, use_cache=True, **self.last)
            self.cache = found.past_key_values
            return found.logits[:, -1].argmax(-1).numpy()


class TorchEncoderEngine:
    """The hidden states of the last layer."""

    def __init__(self, module: Any, compiled: bool) -> None:
        import torch

        self.torch = torch
        self.call: Any = torch.compile(module, dynamic=True) if compiled else module

    def encode(self, ids: Array, mask: Array) -> Array:
        tensors = map(self.torch.from_numpy, (ids, mask))
        with self.torch.inference_mode():
            given = dict(zip(("input_ids", "attention_mask"), tensors, strict=True))
            return self.call(**given)[0].float().numpy()
