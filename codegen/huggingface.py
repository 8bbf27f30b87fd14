"""The target `huggingface`: a plain model folder that transformers loads, cut shapes included.

The configuration is the source's, with the numbers changed that the weights' new shapes ask for
(see `fit_configuration`). The folder is loaded again and must give the program's own results.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..ir.compare import epsilon, relative_deviation
from ..ir.encoded import Encoded
from ..ir.errors import UnsupportedByTarget
from ..ir.interpret import run
from ..ir.pattern import bound_arguments
from ..ir.program import Program
from ..ir.read_hf_folder import (
    Attention,
    configuration,
    import_transformers,
    model_class,
    read_config,
    read_hf_folder,
)
from ..ir.weights import Entry, Weights
from .checkpoint_entries import checkpoint_entries, joined_names, rename, row_heights
from .checkpoint_folder import DTYPES, planned_entry, read_shard_bytes, write_folder
from .checkpoint_source import ORIGIN, model_of, source_folder
from .fit_configuration import Fitted, Shapes, fit_configuration
from .target import Target

MODEL_CONFIG = "model_config"
"""Where a program that was captured from a module of transformers tells its configuration."""

_NORMS = {
    torch.ops.planish.rms_norm.default,
    torch.ops.aten.rms_norm.default,
    torch.ops.aten.layer_norm.default,
}
_GROWTH = 8.0
"""As for every pass that keeps the function but rounds otherwise (`Contract.growth`)."""


def export(
    program: Program, folder: Path, profile: str, metadata: Mapping[str, Any], **options: Any
) -> dict[str, Any]:
    """Write the folder and load it again; raises UnsupportedByTarget."""
    if "cached" in program.facts:
        raise UnsupportedByTarget(
            "target huggingface writes models without a KV cache in their graph",
            expected="a program without insert_kv_cache: transformers keeps the cache itself",
            found="a program with a cache",
            fix="export without --kv-cache",
        )
    source, settings, made = _source(program, options["source"])
    kind = type(_config(settings))

    def build(changed: Mapping[str, Any]) -> Shapes | None:
        try:
            return model_of(source, changed, made, kind.from_dict(dict(changed))).shapes
        except Exception:  # whatever a model class says to sizes that it was not made for
            return None

    unmade = build(settings)
    if unmade is None:
        raise _unfit(program, ["its class does not take its configuration"])
    fitted = fit_configuration(settings, _shapes(program), build)
    if fitted.unfit:
        raise _unfit(program, fitted.unfit)
    fitted.settings.update(_epsilons(program, settings, fitted))
    model = model_of(source, fitted.settings, made, kind.from_dict(dict(fitted.settings)))
    entries = checkpoint_entries(_renamed(program, fitted), model, "huggingface")
    dtype = DTYPES[options["dtype"]]
    write_folder(
        folder,
        model,
        {name: planned_entry(entry, dtype) for name, entry in entries.items()},
        {},
        untied=any(name in entries for name in model.ties),
        shard_bytes=options["shard_gb"],
    )
    changed = {name: list(pair) for name, pair in fitted.changes.items()}
    found: dict[str, Any] = {"configuration": changed}
    if options["check"] == "yes":
        found["deviation"] = _check(program, folder, exact=dtype is None)
    found["decoded"] = [name for name, e in entries.items() if isinstance(e, Encoded)]
    return {"checkpoint": found}


def _source(program: Program, named: str) -> tuple[Path | None, dict[str, Any], Any]:
    """Where tokenizer files lie, the whole configuration, and the model class."""
    transformers = import_transformers()
    known = program.metadata.get(MODEL_CONFIG)
    if not named and not program.metadata.get(ORIGIN) and known:
        settings = json.loads(known)
        config = _config(settings)
        return None, settings, model_class(transformers, config, settings, Path())
    folder = source_folder(program, named, "huggingface")
    written = read_config(folder, quantized=True)
    config = configuration(transformers, folder)
    made = model_class(transformers, config, written, folder)
    settings = json.loads(config.to_json_string(use_diff=False))
    settings.pop("quantization_config", None)
    return folder, settings | {"architectures": [made.__name__]}, made


def _config(settings: Mapping[str, Any]) -> Any:
    known: Any = import_transformers().AutoConfig
    return known.for_model(settings["model_type"])


# the weights by the model's names


def _shapes(program: Program) -> dict[str, torch.Size]:
    """Shapes by the names before fusing, ties under all of their names."""
    weights = program.weights
    found = {name: weights.shape(name) for name in [*weights, *weights.aliases]}
    for node in program.weight_nodes():
        name = str(node.target)
        heights = row_heights(node)
        parts = joined_names(name)
        if parts and len(parts) == len(heights):
            rest = weights.shape(name)[1:]
            for part, height in zip(parts, heights, strict=True):
                found[part] = torch.Size((height, *rest))
    return found


def _renamed(program: Program, fitted: Fitted) -> Program:
    """The program with its weights under the names of the new model."""
    new = {name: fresh for fresh, name in fitted.renamed.items() if fresh != name}
    if not new:
        return program
    renamed = program.copy()
    entries: dict[str, Entry] = {
        rename(name, new): renamed.weights.entry(name) for name in renamed.weights
    }
    aliases = {
        rename(alias, new): rename(name, new) for alias, name in renamed.weights.aliases.items()
    }
    renamed.weights = Weights(entries, aliases)
    for node in renamed.weight_nodes():
        node.target = rename(str(node.target), new)
    return renamed


def _epsilons(program: Program, settings: Mapping[str, Any], fitted: Fitted) -> dict[str, float]:
    """Configured numbers that a cut multiplied by old width / new width: those of norms."""
    seen = {
        float(value)
        for node in program.graph.nodes
        if node.target in _NORMS
        for value in [bound_arguments(node)["eps"]]
    }
    ratios = {Fraction(a, b) for a, b in fitted.changes.values() if a and b}
    found: dict[str, float] = {}
    for name, value in settings.items():
        if isinstance(value, float) and not any(math.isclose(value, e) for e in seen):
            for ratio in ratios:
                near = [e for e in seen if math.isclose(e, value * ratio, rel_tol=1e-9)]
                found |= dict.fromkeys([name], near[0]) if near else {}
    return found


# the proof


def _check(program: Program, folder: Path, exact: bool) -> float | None:
    """How far the folder's model lies from the program on its examples; None without examples.

    The two forms of attention fill fully masked rows with different numbers, so the one that the
    program was captured with may have to be found.
    """
    if not program.examples:
        return None
    flat = list(program.examples)
    native, wide = run(program, flat), run(program, flat, float64=True)
    ours = [(n, w) for n, w in zip(native, wide, strict=True) if isinstance(n, Tensor)]
    own = max(relative_deviation(w, n.double()) for n, w in ours)
    limit = _GROWTH * max(own, max(epsilon(n) for n, _ in ours))
    found = math.inf
    for attention in (None, "eager"):
        theirs = _results(program, folder, attention)
        if len(theirs) == len(ours):
            pairs = zip(ours, theirs, strict=True)
            found = min(found, max(relative_deviation(w, t.double()) for (_, w), t in pairs))
        if found <= limit:
            return found
    if exact:
        raise UnsupportedByTarget(
            "the model's class computes something else than the program with these weights",
            where=str(program.metadata.get("source", "")),
            expected=f"a relative deviation of at most {limit:.1e}",
            found=f"{found:.1e}",
            fix="what was cut has no place in its configuration: cut with norms=own, or other "
            "units, or export to onnx or torch",
        )
    return found


def _results(program: Program, folder: Path, attention: Attention | None) -> list[Tensor]:
    """What the folder's model gives for the program's examples."""
    args, kwargs = pytree.tree_unflatten(list(program.examples), program.in_spec)
    try:
        with torch.no_grad():
            leaves = pytree.tree_leaves(
                read_hf_folder(folder, attention=attention)(*args, **kwargs)
            )
    finally:
        gc.collect()  # a model refers to itself, and two of them may not fit into memory
    return [value for value in leaves if isinstance(value, Tensor)]


def _unfit(program: Program, unfit: list[str]) -> UnsupportedByTarget:
    shown = "; ".join(unfit[:10]) + (f" and {len(unfit) - 10} more" if len(unfit) > 10 else "")
    return UnsupportedByTarget(
        "no configuration of the model's class has these shapes",
        where=str(program.metadata.get("source", "")),
        expected="the same sizes in all layers, and whole layers",
        found=shown,
        fix="cut what its configuration counts, the same in all layers (cut.ffn, say; some classes "
        "want a width that their number of heads divides), or export to onnx or torch, which take "
        "any shape",
    )


TARGET = Target(
    "huggingface",
    export,
    profiles=("huggingface",),
    doc="a plain model folder that transformers loads, cut shapes included",
    options={"dtype": tuple(DTYPES), "check": ("yes", "no")},
    open_options={
        "source": ("", str),
        "shard_gb": ("5", read_shard_bytes),
    },
)
