"""The Python interface: trace, optimize, explain; Optimized with its export."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .calibration import calibration_batches
from .decoder_source import DecoderSource
from .ir.history import History
from .ir.program import Program
from .passes.pipeline import Pipeline
from .recipes import Recipe, find_recipe
from .report import Report, report
from .sources import load_program

Model = torch.nn.Module | Program | str | Path
Progress = Callable[[int, int, str], None]


def trace(
    model: Model,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    kv_cache: bool = False,
    keep_codes: bool = False,
) -> Program:
    """Capture a model as a Program, callable like the model.

    model: a module; a folder (Hugging Face or a saved program); a GGUF file; a `.pt2` file.
    args, kwargs: example inputs; optional where a file tells enough to make some. Batch and
    length stay free unless dynamic_shapes (as for `torch.export.export`) says otherwise.
    kv_cache: made examples are token ids alone, without a padding mask, as for decoding one text.
    keep_codes: the weights of a GGUF file stay in the number formats of its blocks, code by code;
    otherwise they become float32. Those of a quantized folder (GPTQ, AWQ, compressed-tensors)
    always stay as they are.
    Raises CaptureFailed, StatefulModel, WrongInput and the errors of the file formats.
    """
    if isinstance(model, Program):
        return model
    if isinstance(model, torch.nn.Module):
        from .ir.capture import capture_module

        program = capture_module(model, _as_tuple(args), kwargs, dynamic_shapes)
        program.metadata |= model_config(model)
        return program
    return load_program(
        Path(model), _as_tuple(args), dict(kwargs or {}), dynamic_shapes, kv_cache, keep_codes
    )


def optimize(
    model: Model,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    recipe: str | Path | Recipe = "exact",
    calibration: Iterable[Any] | str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    verify: str = "facts",
    on_break: str = "rollback",
    kv_cache: bool = False,
    adapters: Iterable[str | Path] = (),
    progress: Progress | None = None,
) -> Optimized:
    """Trace a model (unless it is a Program already) and run a recipe on it.

    calibration: batches, each like the model's inputs (a tensor, a tuple or a mapping of keywords);
    or a file: a text, or safetensors with 0.input_ids, 1.input_ids, ...
    options: {"pass.option": value} laid over the recipe's; {"option": value} is given to every
    step of the recipe that has the option. verify: "structure", "facts" or
    "numbers" (contracts are checked on the example inputs and on two calibration batches).
    kv_cache: a decoder gets `past` and returns (result, present), see `insert_kv_cache`; what is
    then exported to onnx is a folder that `planish.Generator` reads.
    adapters: PEFT folders, merged into the weights before anything else ("PATH=0.5" weighs one);
    in a quantized model by `merge_into_codes`.
    """
    chosen = find_recipe(recipe)
    chosen = chosen.with_kv_cache() if kv_cache else chosen
    folders = [str(folder) for folder in adapters]
    chosen.check_options(options, folders)  # before the model is traced
    program = trace(model, args, kwargs, kv_cache=kv_cache)
    dense = "dense_weights" in program.facts
    chosen = chosen.with_adapters(folders, dense)
    steps = chosen.passes(options)
    named = isinstance(calibration, (str, Path))
    origin = DecoderSource.of(model) if named else None
    batches = calibration_batches(program, calibration, origin)
    line = Pipeline(steps, verify=verify, on_break=on_break)
    if progress is not None:
        line.progress = progress
    probes = [list(program.examples)] if program.examples else []
    result = line.run(program, probes=[*probes, *batches[:2]], calibration=batches)
    source = DecoderSource.of(model) if "cache" in result.metadata else None
    return Optimized(result, chosen, dict(options or {}), source)


def explain(model: Model | Optimized, args: tuple[Any, ...] = (), **kwargs: Any) -> Report:
    """What planish recognizes in a model and what it leaves alone, and why."""
    if isinstance(model, Optimized):
        return report(model.program)
    return report(trace(model, args, kwargs or None))


def model_config(model: torch.nn.Module) -> dict[str, str]:
    """What a module of transformers tells of its shape, as text: for writing it as a folder."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_json_string") or not hasattr(config, "model_type"):
        return {}
    settings = json.loads(config.to_json_string(use_diff=False))
    settings["architectures"] = [type(model).__name__]
    return {"model_config": json.dumps(settings)}


def _as_tuple(args: Any) -> tuple[Any, ...]:
    return (args,) if isinstance(args, Tensor) else tuple(args)


@dataclass
class Optimized:
    """An optimized model: called like the original, exported to a target.

    source: of a decoder with a KV cache, what its origin tells about tokens and text.
    """

    program: Program
    recipe: Recipe
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    source: DecoderSource | None = None
    _callable: Callable[..., Any] | None = field(default=None, repr=False)

    @property
    def history(self) -> History:
        """What each pass did."""
        return self.program.history

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the compiled program; the first call compiles it."""
        flat = self.program.flatten_inputs(args, kwargs)
        if self._callable is None:
            from .codegen.torch_cpu import compile_program

            self._callable = compile_program(self.program)
        with torch.no_grad():
            return self.program.unflatten_outputs(self._callable(*flat))

    def export(
        self,
        folder: str | Path,
        *,
        target: str = "onnx",
        profile: str | None = None,
        force: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a folder for a target; returns its path.

        options: the target's own, such as activations="int8" for onnx, which is faster and rounds
        the activations of packed matmuls too, or logits="last", which leaves out the logits of a
        prompt that generating does not read.

        Raises OutputExists (unless force), OutputNotWritable, UnknownTarget, UnsupportedByTarget.
        A decoder with a KV cache, written to onnx, becomes a folder that `Generator` reads: with
        tokenizer, generation_config.json and genai_config.json, as far as the source has them.
        The folder appears whole or not at all.
        """
        from .codegen.target import export_program

        metadata = {"recipe": self.recipe.name, "options": self.options}
        return export_program(
            self.program,
            Path(folder),
            target,
            profile=profile,
            force=force,
            metadata=metadata,
            options=options,
            extra=self._decoder_files,
        )

    def _decoder_files(self, folder: Path, sections: Mapping[str, Any]) -> dict[str, Any]:
        if self.source is None or "decoder" not in sections:
            return {}
        from .decoder_folder import write_decoder_files

        return write_decoder_files(self.source, folder, sections["decoder"])
