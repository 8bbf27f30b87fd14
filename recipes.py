"""Recipes: named orders of passes. The one place where order is decided.

A recipe is a list of passes with options. The built-in ones are below; a user's own is a YAML file:

    name: mine
    description: exact fusions, then 4-bit weights
    passes:
      - recipe: exact
      - quantize_weights: {bits: 4, group_size: 64}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .ir.errors import UnknownRecipe
from .passes.pipeline import Pipeline
from .recipe import BadRecipe, Recipe, Step


def _steps(*parts: str | tuple[str, dict[str, Any]]) -> tuple[Step, ...]:
    named = [(part, {}) if isinstance(part, str) else part for part in parts]
    return tuple(Step(name, tuple(options.items())) for name, options in named)


_RAISE = _steps(
    "canonicalize",
    "merge_lora",
    "share_subexpressions",
    "raise_norm",
    "raise_rotary",
    "raise_gelu",
    "raise_gate",
    "raise_attention",
    "share_subexpressions",
    "drop_dead",
)
_FUSE = _steps("order_columns", "fuse_qkv", "fuse_gate_up", "drop_dead")
_EXACT = _RAISE + _steps("fold_constants") + _FUSE
_TABLES = "int8-g32-sym-f32"


def _before_fusing(*parts: str | tuple[str, dict[str, Any]]) -> tuple[Step, ...]:
    """Lossy steps between raising and fusing, where weights have the model's own names."""
    return _RAISE + _steps("fold_constants", *parts) + _FUSE


def _weights(bits: int, group_size: int | None, **more: Any) -> tuple[Step, ...]:
    return _before_fusing(("quantize_weights", {"bits": bits, "group_size": group_size, **more}))


def _low_bits(bits: int) -> Recipe:
    """Few levels need zero points and a search for the best grid; 8 bits do without."""
    steps = _weights(bits, 32, symmetric=False, search=True, embeddings=_TABLES)
    return Recipe(f"int{bits}", f"{bits}-bit weights, groups of 32; 8-bit embeddings", steps)


_W8 = ("quantize_weights", {"bits": 8})
_A8 = "quantize_activations"


def _named(
    name: str, description: str, *parts: str | tuple[str, dict[str, Any]], bits: int = 4
) -> Recipe:
    """A method of the field by its own name: linear layers only, groups of 64, symmetric."""
    grid = {"bits": bits, "group_size": 64, "scale_dtype": "float16"}
    filled = [(part, grid) if isinstance(part, str) and part in _GRID else part for part in parts]
    return Recipe(name, description, _before_fusing(*filled))


_GRID = ("quantize_weights", "quantize_gptq", "awq", "clip_weights")
_METHODS = (
    _named("rtn4", "4-bit weights, rounded to nearest", "quantize_weights"),
    _named("gptq4", "4-bit weights by GPTQ; needs calibration", "quantize_gptq"),
    _named("gptq3", "3-bit weights by GPTQ; needs calibration", "quantize_gptq", bits=3),
    _named(
        "awq4",
        "4-bit weights, channels scaled and groups clipped (AWQ); needs calibration",
        "awq",
        "clip_weights",
        "quantize_weights",
    ),
    _named("hqq4", "4-bit weights with half-quadratic zero points, no calibration", "quantize_hqq"),
    _named(
        "nf4",
        "4-bit NormalFloat weights in blocks of 64, scales quantized too (QLoRA)",
        ("quantize_weights", {"format": "nf4"}),
    ),
    _named(
        "mxfp4",
        "4-bit floating-point weights in blocks of 32 (OCP MX)",
        ("quantize_weights", {"format": "mxfp4"}),
    ),
    _named(
        "fp8",
        "8-bit floating-point weights (E4M3), a scale a channel",
        ("quantize_weights", {"format": "fp8-e4m3-channel"}),
    ),
    _named(
        "smooth-w8a8",
        "8-bit weights and activations after SmoothQuant; needs calibration",
        ("smooth", {"search": True, "activations": "token"}),
        _W8,
        _A8,
    ),
    _named(
        "smooth-w8a8-static",
        "the same with one static scale for each activation (O3), the fastest in ONNX",
        ("smooth", {"search": True}),
        _W8,
        (_A8, {"scheme": "static_tensor"}),
    ),
    _named(
        "zeroquant",
        "8-bit weights in groups of 64 and 8-bit activations by token (ZeroQuant)",
        ("quantize_weights", {"bits": 8, "group_size": 64}),
        _A8,
    ),
    _named(
        "q4k",
        "4-bit weights in groups of 32, their scales and offsets in 6 bits (as GGUF's Q4_K)",
        ("quantize_weights", {"format": "int4-g32-offset-k"}),
    ),
    _named(
        "llm-int8",
        "8-bit weights and activations, outlier columns of the activations in floats (LLM.int8)",
        _W8,
        (_A8, {"scheme": "llm_int8"}),
    ),
    _named(
        "sparse24",
        "2:4 weights by SparseGPT, stored in half; needs calibration",
        ("prune_sparsegpt", {"sparsity": "2:4"}),
        "pack_sparse",
    ),
    _named(
        "sparse24-gptq4",
        "2:4 weights by SparseGPT, then 4 bits by GPTQ, of which 3 are stored; needs calibration",
        ("prune_sparsegpt", {"sparsity": "2:4"}),
        "quantize_gptq",
        "pack_sparse",
    ),
    _named(
        "ternary",
        "weights of -1, 0 and 1 with 8-bit activations (BitNet b1.58): for models trained so",
        ("quantize_weights", {"format": "ternary-channel"}),
        _A8,
    ),
)


_BUILT_IN = (
    Recipe("raise", "recognize norms, rotary embeddings, gates and attention", _RAISE),
    Recipe("exact", "the same function, faster: raise and fuse, nothing lossy", _EXACT),
    Recipe(
        "int8",
        "8-bit weights, groups of 32, embeddings included",
        _weights(8, 32, embeddings=_TABLES),
    ),
    Recipe(
        "cut",
        "layers, heads, FFN channels or width cut out: --set cut.ffn=0.25, or cut.budget=0.3, or "
        "--target-shape layers=24,heads=12,ffn=2048",
        _before_fusing("cut"),
    ),
    _low_bits(4),
    _low_bits(3),
    _low_bits(2),
    *_METHODS,
)


def recipes() -> dict[str, Recipe]:
    """The built-in recipes by name."""
    return {recipe.name: recipe for recipe in _BUILT_IN}


def find_recipe(name: str | Path | Recipe) -> Recipe:
    """A built-in recipe by name, or one from a YAML file; raises UnknownRecipe, BadRecipe."""
    if isinstance(name, Recipe):
        return name
    known = recipes()
    if str(name) in known:
        return known[str(name)]
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UnknownRecipe(f"there is no recipe file {path}", fix="check the path")
        return read_recipe(path.read_text(encoding="utf-8"), where=str(path))
    raise UnknownRecipe.named(str(name), known)


def read_recipe(text: str, where: str = "recipe") -> Recipe:
    """Parse a recipe's YAML; raises BadRecipe, UnknownPass, UnknownOption."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadRecipe("the recipe is not YAML", where=where, found=str(error)) from error
    if not isinstance(data, dict) or not isinstance(data.get("passes"), list):
        raise BadRecipe(
            "the recipe has no list of passes",
            where=where,
            expected="a mapping with name, description and passes",
            found=type(data).__name__,
            fix="see planish recipes --yaml exact",
        )
    unknown = set(data) - {"name", "description", "passes"}
    if unknown:
        raise BadRecipe(
            "the recipe has unknown keys", where=where, found=", ".join(map(str, sorted(unknown)))
        )
    steps = tuple(step for item in data["passes"] for step in _read_step(item, where))
    recipe = Recipe(str(data.get("name", where)), str(data.get("description", "")), steps)
    recipe.passes()  # names and options are checked now, not in the middle of a run
    return recipe


def _read_step(item: Any, where: str) -> tuple[Step, ...]:
    if isinstance(item, str):
        return (Step(item),)
    if not isinstance(item, dict) or len(item) != 1:
        raise BadRecipe(
            "a step is neither a pass's name nor a mapping of one name to options",
            where=where,
            found=repr(item),
            fix="write - canonicalize, or - quantize_weights: {bits: 4}",
        )
    (name, options), *_ = item.items()
    if name == "recipe":
        return find_recipe(str(options)).steps
    if not isinstance(options, dict):
        raise BadRecipe(
            f"the options of {name} are not a mapping", where=where, found=repr(options)
        )
    return (Step(str(name), tuple(options.items())),)


def pipeline(
    recipe: str | Path | Recipe,
    options: Mapping[str, Any] | None = None,
    *,
    verify: str = "facts",
    on_break: str = "rollback",
) -> Pipeline:
    """The pipeline of a recipe with options laid over it."""
    return Pipeline(find_recipe(recipe).passes(options), verify=verify, on_break=on_break)


__all__ = ["BadRecipe", "Recipe", "Step", "find_recipe", "pipeline", "read_recipe", "recipes"]
