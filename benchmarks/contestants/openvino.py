"""OpenVINO as a contestant, compressed or quantized by NNCF.

optimum-intel 2.2, its usual exporter, does not import beside transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench_worker import sibling

Array = np.ndarray[Any, Any]
Told = Mapping[str, Any]

IMPORTS = ["openvino"]
PACKAGES = ["openvino", "openvino-genai", "nncf", "torch", "transformers", "onnxscript"]
_F16, _Q4_0 = 1, 2  # LLAMA_FTYPE_MOSTLY_*
_INT8 = {"heat": "int8", "bits": 8, "head_bits": 8, "cache_bits": 8}
_INT4 = {"heat": "int4", "bits": 4.5, "head_bits": 8, "cache_bits": 8}
CONTESTANTS: list[dict[str, Any]] = [
    {"name": "OpenVINO float32", "kind": "decoder", "cache_bits": 8},
    {
        "name": "OpenVINO, NNCF int8",
        "kind": "decoder",
        **_INT8,
        "options": {"weights": "INT8_ASYM"},
    },
    {
        "name": "OpenVINO, NNCF int4",
        "kind": "decoder",
        **_INT4,
        "options": {"weights": "INT4_ASYM", "group": 64},
    },
    {"name": "OpenVINO float32", "kind": "encoder"},
    {
        "name": "OpenVINO, NNCF int8",
        "kind": "encoder",
        **_INT8,
        "compute": "int8",
        "options": {"static": True},
    },
]


def prepare(options: Told, model: Told, out: Path) -> None:
    """Convert; then compress or quantize with NNCF."""
    import openvino

    made = _export(model, out)
    if "weights" in options:
        made = _compress(made, options)
    elif options.get("static"):
        made = _quantize(made, model)
    openvino.save_model(made, out / "model.xml", compress_to_fp16=False)
    for rest in (*out.glob("model.onnx*"), *out.glob("gguf/*")):
        rest.unlink()


def _export(model: Told, out: Path) -> Any:
    """A decoder by OpenVINO GenAI from a GGUF file, whose float weights it keeps; an encoder by
    OpenVINO from torch's ONNX export.
    """
    import openvino

    if model["kind"] == "encoder":
        sibling("bench_onnxruntime").export_onnx(model, out)
        return openvino.Core().read_model(out / "model.onnx")
    if model["gguf"] is None:
        raise NotImplementedError("OpenVINO GenAI reads GGUF files, and this model has none")
    import openvino_genai

    (out / "gguf").mkdir()
    sibling("benchmarks/contestants/llama_cpp").quantize(model["gguf"], out / "gguf/m.gguf", _F16)
    openvino_genai.LLMPipeline(str(out / "gguf/m.gguf"), "CPU", enable_save_ov_model=True)
    return openvino.Core().read_model(out / "gguf/openvino_model.xml")


def _compress(made: Any, options: Told) -> Any:
    import nncf

    group = {"group_size": options["group"], "ratio": 1.0} if "group" in options else {}
    return nncf.compress_weights(made, mode=nncf.CompressWeightsMode[options["weights"]], **group)


def _quantize(made: Any, model: Told) -> Any:
    import nncf

    texts = np.load(model["calibration"])
    names = [port.get_any_name() for port in made.inputs]

    def inputs(ids: Array) -> dict[str, Array]:
        known = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "token_type_ids": np.zeros((1, len(ids)), np.int64),
        }
        return {name: known[name] for name in names}

    data = nncf.Dataset(list(texts), inputs)
    return nncf.quantize(made, data, model_type=nncf.ModelType.TRANSFORMER)


def load(options: Told, model: Told, path: Path, threads: int) -> Any:
    """An engine of bench_worker."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = openvino.Core().compile_model(str(path / "model.xml"), "CPU", settings)
    return (Decoder if model["kind"] == "decoder" else Encoder)(compiled)


class Decoder:
    """A stateful model: the cache is inside."""

    def __init__(self, compiled: Any) -> None:
        self.request: Any = compiled.create_infer_request()
        self.names = [port.get_any_name() for port in compiled.inputs]
        self.length = 0

    def start(self, ids: Array) -> Array:
        self.request.reset_state()
        self.length = 0
        return self._run(ids)[:, -1].argmax(-1)

    def step(self, tokens: Array) -> Array:
        return self._run(tokens[:, None])[:, -1].argmax(-1)

    def logits(self, ids: Sequence[int]) -> Array:
        self.start(np.asarray([ids[:1]]))
        self.request.reset_state()
        self.length = 0
        return np.array(self._run(np.asarray([ids]))[0], np.float32)

    def _run(self, ids: Array) -> Array:
        batch, new = ids.shape
        total = self.length + new
        known = {
            "input_ids": np.ascontiguousarray(ids, np.int64),
            "attention_mask": np.ones((batch, total), np.int64),
            "position_ids": np.tile(np.arange(self.length, total, dtype=np.int64), (batch, 1)),
            "beam_idx": np.arange(batch, dtype=np.int32),
        }
        self.length = total
        found = self.request.infer({name: known[name] for name in self.names}, share_outputs=True)
        return found["logits"]


class Encoder:
    """Hidden states of the last layer."""

    def __init__(self, compiled: Any) -> None:
        self.request: Any = compiled.create_infer_request()
        self.names = [port.get_any_name() for port in compiled.inputs]

    def encode(self, ids: Array, mask: Array) -> Array:
        known = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        return self.request.infer({name: known[name] for name in self.names}, share_outputs=True)[0]
