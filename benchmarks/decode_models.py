"""The folders that the decoding benchmark compares, made once and kept in planish's cache."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import planish
from planish.decoder_source import DecoderSource
from planish.demo_models import LANGUAGE_MODEL, hf_folder
from planish.ir.program_folder import load_program, save_program
from planish.ir.read_gguf import cache_folder

_QUANTIZE = """
import ctypes, sys, llama_cpp
options = llama_cpp.llama_model_quantize_default_params()
options.ftype, options.allow_requantize = int(sys.argv[3]), True
failed = llama_cpp.llama_model_quantize(
    sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(options)
)
sys.exit(failed)
"""
_Q4_0, _Q8_0 = 2, 7  # LLAMA_FTYPE_MOSTLY_*


@dataclass(frozen=True)
class Contestant:
    """One row: which engine runs what, with which Python; bits of the weights."""

    name: str
    kind: str
    path: Path
    python: str
    bits: int


def contestants(peers: str | None, names: list[str]) -> list[Contestant]:
    """Those of `names` (all that can be made, if empty); a peer needs its environment's Python."""
    folder = cache_folder() / "bench" / planish.__version__
    folder.mkdir(parents=True, exist_ok=True)
    rows = [Contestant("eager", "eager", hf_folder(LANGUAGE_MODEL), sys.executable, 32)]
    wanted = [name for name in _MAKERS if not names or name in names]
    for name in wanted:
        make, kind, bits, by_peer = _MAKERS[name]
        if by_peer and peers is None:
            continue
        python = peers if by_peer and peers else sys.executable
        path = folder / name.removesuffix(", int8 prompts").replace(" ", "-")
        if not path.exists():
            print(f"making {path}", file=sys.stderr)
            make(path, bits, python)
        rows.append(Contestant(name, kind, path, python, bits))
    return rows


def _recipe(bits: int) -> str:
    return {32: "exact", 8: "int8", 4: "int4"}[bits]


def _optimized(folder: Path, bits: int) -> planish.Optimized:
    """The model after a recipe and insert_kv_cache; captured once for all."""
    captured = folder / "captured"
    if not captured.exists():
        save_program(planish.trace(LANGUAGE_MODEL.path(), kv_cache=True), captured)
    made = planish.optimize(load_program(captured), recipe=_recipe(bits), kv_cache=True)
    made.source = DecoderSource.of(LANGUAGE_MODEL.path())
    return made


def _planish_onnx(path: Path, bits: int, python: str) -> None:
    options = {"logits": "last"} | ({"activations": "int8"} if bits < 32 else {})
    _optimized(path.parent, bits).export(path, target="onnx", options=options)


def _planish_torch(path: Path, bits: int, python: str) -> None:
    save_program(_optimized(path.parent, bits).program, path)


def _genai(path: Path, bits: int, python: str) -> None:
    precision = {32: "fp32", 8: "int8", 4: "int4"}[bits]
    source = str(hf_folder(LANGUAGE_MODEL))
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source]
    more = ["-o", str(path), "-p", precision, "-e", "cpu", "-c", str(path.parent / "hf")]
    subprocess.run([*builder, *more], check=True, capture_output=True)


def _llama_cpp(path: Path, bits: int, python: str) -> None:
    kind = {8: _Q8_0, 4: _Q4_0}[bits]
    arguments = [str(LANGUAGE_MODEL.path()), str(path), str(kind)]
    subprocess.run([python, "-c", _QUANTIZE, *arguments], check=True, capture_output=True)


def _llama_cpp_source(path: Path, bits: int, python: str) -> None:
    """The model's own file, whose 4-bit weights nobody else keeps as they are."""
    path.symlink_to(LANGUAGE_MODEL.path())


def _openvino(path: Path, bits: int, python: str) -> None:
    """OpenVINO GenAI reads a GGUF file and keeps the model it makes beside it."""
    path.mkdir()
    _llama_cpp(path / "model.gguf", bits, python)
    load = "import openvino_genai as g, sys; "
    load += "g.LLMPipeline(sys.argv[1], 'CPU', enable_save_ov_model=True)"
    subprocess.run([python, "-c", load, str(path / "model.gguf")], check=True, capture_output=True)
    (path / "model.gguf").unlink()


_MAKERS = {
    "planish exact onnx": (_planish_onnx, "onnx", 32, False),
    "planish int8 onnx": (_planish_onnx, "onnx", 8, False),
    "planish int4 onnx": (_planish_onnx, "onnx", 4, False),
    "planish int8 torch": (_planish_torch, "torch", 8, False),
    "planish int4 torch": (_planish_torch, "torch", 4, False),
    "planish int8 torch, int8 prompts": (_planish_torch, "torch-a8", 8, False),
    "planish int4 torch, int8 prompts": (_planish_torch, "torch-a8", 4, False),
    "GenAI int4": (_genai, "genai", 4, True),
    "OpenVINO int8": (_openvino, "openvino", 8, True),
    "OpenVINO int4": (_openvino, "openvino", 4, True),
    "llama.cpp Q8_0": (_llama_cpp, "llamacpp", 8, True),
    "llama.cpp Q4_1 (the source file)": (_llama_cpp_source, "llamacpp", 4, True),
    "llama.cpp Q4_0": (_llama_cpp, "llamacpp", 4, True),
}
