"""planish as contestants: a recipe, and what runs it (onnxruntime, its C decoder, Inductor)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .ir.program import Program

Array = np.ndarray[Any, Any]
Told = Mapping[str, Any]

IMPORTS = ["torch", "transformers", "onnxruntime", "planish.api"]
PACKAGES = ["planish", "torch", "onnxruntime", "transformers"]
_INT8 = {"compute": "int8", "heat": "int8", "bits": 8, "head_bits": 8}
_CODES = {"keep_codes": True, "activations": "int8"}
_INT4 = {"compute": "int8", "heat": "int4", "bits": 4, "head_bits": 8}


def _row(
    kind: str, name: str, recipe: str, target: str, more: Told, **options: Any
) -> dict[str, Any]:
    options = {"recipe": recipe, "target": target, **options}
    return {"name": f"planish {name}", "kind": kind, "options": options, **more}


CONTESTANTS: list[dict[str, Any]] = [
    _row("decoder", "exact onnx", "exact", "onnx", {}),
    _row("decoder", "exact torch", "exact", "decoder", {}),
    _row("decoder", "exact Inductor", "exact", "compiled", {}),
    _row("decoder", "int8 onnx", "int8", "onnx", _INT8, activations="int8"),
    _row("decoder", "int8 torch", "int8", "decoder", {**_INT8, "compute": "float32"}),
    _row("decoder", "int8 torch, int8 prompts", "int8", "decoder", _INT8, activations="int8"),
    _row("decoder", "int8 Inductor", "int8", "compiled", {**_INT8, "compute": "float32"}),
    _row("decoder", "int4 onnx", "int4", "onnx", _INT4, activations="int8"),
    _row("decoder", "int4 torch", "int4", "decoder", {**_INT4, "compute": "float32"}),
    _row("decoder", "int4 torch, int8 prompts", "int4", "decoder", _INT4, activations="int8"),
    _row("decoder", "int4 Inductor", "int4", "compiled", {**_INT4, "compute": "float32"}),
    _row("decoder", "source codes torch", "exact", "decoder", _INT4, **_CODES),
    _row("encoder", "exact onnx", "exact", "onnx", {}),
    _row("encoder", "exact Inductor", "exact", "compiled", {}),
    _row("encoder", "int8 onnx", "int8", "onnx", _INT8, activations="int8"),
    _row("encoder", "smooth-w8a8 onnx", "smooth-w8a8", "onnx", _INT8, calibrated=True),
    _row("encoder", "smooth-w8a8 Inductor", "smooth-w8a8", "compiled", _INT8, calibrated=True),
]


def prepare(options: Told, model: Told, out: Path) -> dict[str, float]:
    """Capture, optimize and write; tells the stored bits of a weight."""
    from .api import optimize
    from .ir.program_folder import save_program

    decoder, target = model["kind"] == "decoder", options["target"]
    made = optimize(
        _source(options, model),
        recipe=options["recipe"],
        options=options.get("set"),
        calibration=_calibration(model) if options.get("calibrated") else None,
        kv_cache=decoder,
    )
    facts = stored_bits(made.program)
    if target == "onnx":
        told = {"activations": options["activations"]} if "activations" in options else {}
        told |= {"logits": "last"} if decoder else {}
        made.export(out / "model", target="onnx", options=told)
    else:
        save_program(made.program, out / "model")
    return facts


def _source(options: Told, model: Told) -> Any:
    """The folder, or the program of the GGUF file with its weights code by code."""
    if not options.get("keep_codes"):
        return model["folder"]
    if model["gguf"] is None:
        raise NotImplementedError("this model has no GGUF file")
    from .api import trace

    return trace(model["gguf"], kv_cache=True, keep_codes=True)


def stored_bits(program: Program) -> dict[str, float]:
    """Bits of a weight of the matrix products, and of the vocabulary's tables; scales included."""
    from .ir.weight_roles import weight_roles
    from .ir.weights import entry_bytes

    found: dict[str, float] = {}
    roles = list(weight_roles(program))
    heads = [role for role in roles if role.tables]
    products = [role for role in roles if role.matmuls and not role.tables]
    for key, chosen in (("bits", products), ("head_bits", heads)):
        entries = [program.weights.entry(role.name) for role in chosen]
        count = sum(math.prod(entry.shape) for entry in entries)
        if count:
            found[key] = 8 * sum(map(entry_bytes, entries)) / count
    return found


def _calibration(model: Told) -> list[Any]:
    """Batches of one slice of the file that comes with the model."""
    import torch

    ids = torch.from_numpy(np.load(model["calibration"]))
    masked = model["kind"] == "encoder"
    return [
        {"input_ids": part} | ({"attention_mask": torch.ones_like(part)} if masked else {})
        for part in ids.split(1)
    ]


def load(options: Told, model: Told, path: Path, threads: int) -> Any:
    """An engine of bench_worker."""
    import torch

    from .bench_planish_onnx import OnnxEncoder, OnnxTexts

    torch.set_num_threads(threads)
    folder, target = path / "model", options["target"]
    if model["kind"] == "encoder":
        return OnnxEncoder(folder, threads) if target == "onnx" else CompiledEncoder(folder)
    if target == "onnx":
        return OnnxTexts(folder, threads)
    if target == "compiled":
        return CompiledTexts(folder)
    return OneText(folder, options.get("activations", "float32"))


class OneText:
    """TorchDecoder, which holds one text at a time."""

    def __init__(self, folder: Path, activations: str) -> None:
        from .decode_torch import TorchDecoder
        from .ir.program_folder import load_program

        self.decoder: Any = TorchDecoder(load_program(folder), activations=activations)

    def start(self, ids: Array) -> Array:
        if len(ids) > 1:
            raise NotImplementedError("the decoder holds one text at a time")
        self.decoder.rewind(0)
        return self._best(ids[0])

    def step(self, tokens: Array) -> Array:
        return self._best(tokens)

    def logits(self, ids: Sequence[int]) -> Array:
        self.decoder.rewind(0)
        parts = [self.decoder.advance(list(ids[i : i + 16])) for i in range(0, len(ids), 16)]
        return np.concatenate([part.numpy() for part in parts])

    def _best(self, tokens: Array) -> Array:
        return self.decoder.advance(tokens.tolist(), last=1)[-1:].argmax(-1).numpy()


class CompiledTexts:
    """A cached program compiled by Inductor, for any batch."""

    def __init__(self, folder: Path) -> None:
        import torch

        from .codegen.torch_cpu import compile_program
        from .ir.program_folder import load_program

        self.torch = torch
        self.program = load_program(folder)
        self.call = compile_program(self.program)
        self.past: list[Any] = []

    def start(self, ids: Array) -> Array:
        values = [node.meta["val"] for node in self.program.inputs[1:]]
        self.past = [
            self.torch.zeros(len(ids), value.shape[1], 0, value.shape[3]) for value in values
        ]
        return self._best(ids)

    def step(self, tokens: Array) -> Array:
        return self._best(tokens[:, None])

    def logits(self, ids: Sequence[int]) -> Array:
        self.start(np.asarray([ids[:1]]))
        self.past = [value[:, :, :0] for value in self.past]
        return self._run(np.asarray([ids]))[0].numpy()

    def _best(self, ids: Array) -> Array:
        return self._run(ids)[:, -1].argmax(-1).numpy()

    def _run(self, ids: Array) -> Any:
        with self.torch.inference_mode():
            tokens = self.torch.from_numpy(np.ascontiguousarray(ids))
            logits, *self.past = self.call(tokens, *self.past)
        return logits


class CompiledEncoder:
    """A program compiled by Inductor."""

    def __init__(self, folder: Path) -> None:
        import torch

        from .codegen.torch_cpu import compile_program
        from .ir.program_folder import load_program

        self.torch = torch
        self.call = compile_program(load_program(folder))

    def encode(self, ids: Array, mask: Array) -> Array:
        with self.torch.inference_mode():
            return self.call(*map(self.torch.from_numpy, (ids, mask)))[0].numpy()
