"""The TorchDynamo backend: `torch.compile(model, backend="planish", options={"recipe": "exact"})`.

Each graph that Dynamo finds becomes a Program, is optimized by a recipe and compiled by Inductor.

Options: "recipe": a built-in name or a YAML file (default "exact": nothing lossy); "compiler":
"inductor" (default) or "eager" (the optimized graph runs operator by operator); any other key is
"pass.option", as for `planish.optimize`.

Weights. Lossless recipes read the model's weights anew on every call; passes that would compute
new weights from them are left out (`MAKES_WEIGHTS`). Recipes that quantize hold their own copies.
Before each call these are compared with the model's weights (`ir.fingerprint` says what is seen)
and made again if a weight was written. Writes that bypass autograd (`p.data[3] = ...`) and touch
few elements are not seen: write under `torch.no_grad()` instead, or call `torch._dynamo.reset()`.

Calls that planish does not optimize go to Inductor as they are, with one `FallbackWarning` for
each reason: gradients are wanted, the graph writes to its inputs or draws random numbers, autocast
is on, or capture failed. Without a C++ compiler the optimized graph runs eagerly, also with one
warning. Mistakes in the options are raised. A batch or length of one is compiled for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo import exc
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

from .backend_messages import one_line, unwrapped, warn_once
from .backend_shapes import free_together
from .backend_weights import Refreshed, lay_out
from .ir.capture_dynamo import DynamoCapture, capture_dynamo
from .ir.errors import (
    CaptureFailed,
    FactBroken,
    PassBroke,
    PlanishError,
    UnknownOption,
    WrongOption,
)
from .passes.contract import Fidelity
from .passes.pipeline import Pipeline
from .recipes import pipeline

Compiled = Callable[..., Any]

COMPILERS = ("inductor", "eager")
MAKES_WEIGHTS = ("fold_constants", "fuse_qkv", "fuse_gate_up")
"""Lossless passes whose new weights would go stale when the model's weights are written."""


def planish(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """Compile one graph of Dynamo's; this is what `torch.compile` calls.

    Raises UnknownRecipe, UnknownOption, WrongOption, WrongOrder and what else is wrong with the
    recipe and its options for this model.
    """
    try:
        settings = Settings.read(options, mode)
        return _compile(module, list(inputs), settings)
    except PlanishError as error:
        raise unwrapped(error) from None


@dataclass(frozen=True)
class Settings:
    """The parsed options."""

    compiler: str
    recipe: Pipeline

    @classmethod
    def read(cls, options: Mapping[str, Any] | None, mode: str | None) -> Settings:
        """Raises WrongOption, UnknownRecipe and UnknownOption."""
        if mode is not None:
            raise WrongOption(
                f"mode={mode!r} belongs to Inductor",
                expected="no mode",
                found=repr(mode),
                fix='choose a recipe: options={"recipe": "exact"}',
            )
        rest = dict(options or {})
        recipe, compiler = rest.pop("recipe", "exact"), rest.pop("compiler", "inductor")
        if compiler not in COMPILERS:
            raise WrongOption(
                f"compiler cannot be {compiler!r}",
                expected=" or ".join(COMPILERS),
                found=repr(compiler),
                fix="leave it out for inductor",
            )
        for key in rest:
            if "." not in key:
                raise UnknownOption.named(key, ["recipe", "compiler"], where="torch.compile")
        steps = pipeline(recipe, rest, verify="structure")
        if all(step.contract.fidelity is not Fidelity.LOSSY for step in steps.passes):
            live = [step for step in steps.passes if step.pass_name() not in MAKES_WEIGHTS]
            steps = Pipeline(live, verify="structure")
        return cls(compiler, steps)


def _compile(module: fx.GraphModule, inputs: list[Any], settings: Settings) -> Compiled:
    reason = _not_inference(inputs)
    if reason:
        return _fall_back(module, inputs, settings, reason)
    try:
        captured = capture_dynamo(module, inputs)
        optimized = settings.recipe.run(captured.program)
    except (CaptureFailed, PassBroke, FactBroken) as error:
        return _fall_back(module, inputs, settings, one_line(error))
    free_together(_user_tensors(module, captured, inputs))
    made = lay_out(optimized, captured, inputs)
    compiled = _compile_optimized(made.module, module, inputs, settings)
    if not made.baked:
        return compiled
    return Refreshed(captured, settings.recipe, made, compiled, inputs)


def _not_inference(inputs: Sequence[Any]) -> str | None:
    """Why these arguments cannot be served with weights that are held fixed during the call."""
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return (
            "gradients are enabled and an input or parameter requires them "
            "(for inference, call the model under torch.no_grad())"
        )
    if any(torch.is_autocast_enabled(tensor.device.type) for tensor in tensors):
        return "autocast is on"
    return None


def _compile_optimized(
    optimized: fx.GraphModule, original: fx.GraphModule, inputs: list[Any], settings: Settings
) -> Compiled:
    if settings.compiler == "eager":
        return optimized
    try:
        return _inductor(_duplicate(optimized), inputs)
    except (exc.RestartAnalysis, exc.SkipFrame):  # Dynamo's own control flow
        raise
    except Exception as error:  # whatever Inductor cannot do with our graph, it may with its own
        if _lacks_compiler(error):
            warn_once("there is no working C++ compiler for Inductor", "eagerly, optimized")
            return optimized
        reason = f"Inductor refused the optimized graph: {one_line(error)}"
        return _fall_back(original, inputs, settings, reason)


def _fall_back(
    module: fx.GraphModule, inputs: list[Any], settings: Settings, reason: str
) -> Compiled:
    """The graph as Dynamo gave it, by the chosen compiler, with a warning."""
    warn_once(reason, f"by {settings.compiler} as it is, without planish")
    if settings.compiler == "eager":
        return module
    try:
        return _inductor(_duplicate(module), inputs)
    except Exception as error:
        if not _lacks_compiler(error):
            raise
        warn_once("there is no working C++ compiler for Inductor", "eagerly")
        return module


def _inductor(module: fx.GraphModule, inputs: list[Any]) -> Compiled:
    from torch._inductor.compile_fx import compile_fx  # slow to import

    compiled: Any = compile_fx(module, inputs)
    return compiled


def _duplicate(module: fx.GraphModule) -> fx.GraphModule:
    """A copy over the same tensors: Inductor edits the module that it is given."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, mapping)).meta = dict(
        next(node for node in reversed(module.graph.nodes) if node.op == "output").meta
    )
    for old, new in mapping.items():
        new.meta = dict(old.meta)
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    copied = fx.GraphModule(module, graph)
    copied.meta = dict(module.meta)
    for name in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(module, name):
            setattr(copied, name, getattr(module, name))
    return copied


def _lacks_compiler(error: BaseException) -> bool:
    inner = getattr(error, "inner_exception", error)
    return isinstance(inner, (InvalidCxxCompiler, CppCompileError))


def _user_tensors(
    module: fx.GraphModule, captured: DynamoCapture, inputs: list[Any]
) -> list[tuple[fx.Node, Tensor]]:
    placeholders = module.graph.find_nodes(op="placeholder")
    return [
        (node, value)
        for node, name, value in zip(placeholders, captured.weights, inputs, strict=True)
        if name is None and isinstance(value, Tensor)
    ]
