"""onnxruntime as a contestant: the model as torch.onnx exports it, and its own quantization of it.

Imports nothing of planish, so that the peers' environment can build on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Told = Mapping[str, Any]

MODEL = "model.onnx"
IMPORTS = ["torch", "transformers", "onnxruntime"]
PACKAGES = ["onnxruntime", "onnx", "onnxscript", "torch", "transformers"]
CONTESTANTS: list[dict[str, Any]] = [
    {"name": "onnxruntime", "kind": "decoder"},
    {"name": "onnxruntime", "kind": "encoder"},
]


def prepare(options: Told, model: Told, out: Path) -> None:
    """Export; then quantize as the option `quantize` says."""
    export_onnx(model, out)


def load(options: Told, model: Told, path: Path, threads: int) -> Any:
    """An engine of bench_worker."""
    decoder = model["kind"] == "decoder"
    return (OnnxDecoderEngine if decoder else OnnxEncoderEngine)(open_session(path, threads))


def export_onnx(model: Told, out: Path) -> None:
    """model.onnx in `out`: a decoder with its cache as inputs and outputs, or an encoder."""
    import torch
    import transformers

    decoder = model["kind"] == "decoder"
    auto = transformers.AutoModelForCausalLM if decoder else transformers.AutoModel
    module = auto.from_pretrained(model["folder"], dtype=torch.float32).eval()
    wrapped, inputs, sizes = (_decoder if decoder else _encoder)(module, model)
    with torch.no_grad():
        program = torch.export.export(wrapped, inputs, dynamic_shapes=sizes)
        made = torch.onnx.export(program, dynamo=True, optimize=True, verbose=False)
    assert made is not None
    made.save(str(out / MODEL), external_data=True)


def _encoder(module: Any, model: Told) -> tuple[Any, tuple[Any, ...], Any]:
    import torch

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.module(input_ids=input_ids, attention_mask=attention_mask)[0]

    ids = torch.randint(0, model["vocabulary"], (2, 7))
    most = getattr(module.config, "max_position_embeddings", None)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=most)}
    return Flat(), (ids, torch.ones_like(ids)), (sizes, sizes)


def _decoder(module: Any, model: Told) -> tuple[Any, tuple[Any, ...], Any]:
    """kept: int64 [n], the positions whose logits are wanted."""
    import torch
    import transformers

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, input_ids: Any, kept: Any, past: Any) -> Any:
            cache = transformers.DynamicCache(past)
            found = self.module(
                input_ids, past_key_values=cache, use_cache=True, logits_to_keep=kept
            )
            layers = found.past_key_values.layers
            return found.logits, [(layer.keys, layer.values) for layer in layers]

    config = module.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    buffer = torch.zeros(2, heads, 5, width)
    past = [(buffer.clone(), buffer.clone()) for _ in range(config.num_hidden_layers)]
    batch, length, before, rows = map(torch.export.Dim, ("batch", "length", "before", "rows"))
    layer = {0: batch, 2: before}
    inputs = (torch.randint(0, model["vocabulary"], (2, 3)), torch.tensor([0, 2]), past)
    return Flat(), inputs, ({0: batch, 1: length}, {0: rows}, [(layer, layer)] * len(past))


def open_session(path: Path, threads: int) -> Any:
    """An onnxruntime session of model.onnx."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    settings.log_severity_level = 3  # errors only
    return ort.InferenceSession(path / MODEL, settings, providers=["CPUExecutionProvider"])


class OnnxDecoderEngine:
    """A session whose cache outputs are the next run's inputs, bound and never copied."""

    def __init__(self, session: Any) -> None:
        import onnxruntime as ort

        self.ort, self.session = ort, session
        self.binding: Any = session.io_binding()
        self.ids, self.kept, *self.past = session.get_inputs()
        self.outputs = session.get_outputs()
        self.cache: list[Any] = []

    def start(self, ids: Array) -> Array:
        batch = len(ids)
        empty = [np.zeros((batch, p.shape[1], 0, p.shape[3]), np.float32) for p in self.past]
        self.cache = [self.ort.OrtValue.ortvalue_from_numpy(array) for array in empty]
        return self._run(ids, [ids.shape[1] - 1])[:, -1].argmax(-1)

    def step(self, tokens: Array) -> Array:
        return self._run(tokens[:, None], [0])[:, -1].argmax(-1)

    def logits(self, ids: Sequence[int]) -> Array:
        self.start(np.asarray([ids[:1]]))
        first = self._run(np.asarray([ids[1:]]), range(len(ids) - 1))[0]
        self.start(np.asarray([ids[:1]]))
        return np.concatenate([self.last[0], first])

    def _run(self, ids: Array, kept: Sequence[int]) -> Array:
        for port, value in zip(self.past, self.cache, strict=True):
            self.binding.bind_ortvalue_input(port.name, value)
        for port, array in ((self.ids, ids), (self.kept, np.asarray(kept))):
            whole = np.ascontiguousarray(array, np.int64)
            self.binding.bind_ortvalue_input(
                port.name, self.ort.OrtValue.ortvalue_from_numpy(whole)
            )
        for port in self.outputs:
            self.binding.bind_output(port.name, "cpu")
        self.session.run_with_iobinding(self.binding)
        values = self.binding.get_outputs()
        self.cache, self.last = values[1:], values[0].numpy()
        return self.last


class OnnxEncoderEngine:
    """A session of ids and a mask."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.names = [port.name for port in session.get_inputs()]

    def encode(self, ids: Array, mask: Array) -> Array:
        return self.session.run(None, dict(zip(self.names, (ids, mask), strict=True)))[0]
