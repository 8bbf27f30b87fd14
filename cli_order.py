"""What an export was asked for, and everything that can be refused before a model is read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .calibration import Slicing
from .codegen.bundle import check_output
from .codegen.target import find_target
from .ir.errors import OutputNotWritable, SourceNotFound, WrongOption
from .passes.merge_adapters import MergeAdapters
from .passes.pipeline import Pipeline
from .recipes import Recipe, find_recipe


@dataclass(frozen=True)
class Order:
    """What `planish export` was asked for."""

    source: Path
    out: Path | None
    recipe: str = "exact"
    options: dict[str, str] = field(default_factory=dict[str, str])
    target: str = "onnx"
    profile: str | None = None
    verify: str = "facts"
    calibration: Path | None = None
    slicing: Slicing = field(default_factory=Slicing)
    force: bool = False
    target_options: dict[str, str] = field(default_factory=dict[str, str])
    kv_cache: bool = False
    keep_codes: bool = False
    adapters: tuple[str, ...] = ()


def parse_settings(settings: Sequence[str], flag: str = "--set") -> dict[str, str]:
    """["quantize_weights.bits=4"] as a mapping; raises WrongOption."""
    parsed: dict[str, str] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise WrongOption(
                f"{flag} {setting} does not give an option a value",
                expected=f"{flag} OPTION=VALUE" + (" or PASS.OPTION=VALUE" * (flag == "--set")),
                found=setting,
                fix="for example --set quantize_weights.group_size=64",
            )
        parsed[name.strip()] = value.strip()
    return parsed


def shaped(
    recipe: str, options: dict[str, str], target_shape: str | None
) -> tuple[str, dict[str, str]]:
    """Recipe and options with a target shape laid over them; raises WrongOption.

    The recipe cut is exact with a cut in it, so the default gives way to it.
    """
    if target_shape is None:
        return recipe, options
    if "cut.shape" in options or not target_shape:
        raise WrongOption(
            "the target shape is given twice" if target_shape else "the target shape is empty",
            expected="--target-shape, or --set cut.shape=",
            found=", ".join(filter(None, [target_shape, options.get("cut.shape", "")]))
            or "nothing",
            fix="for example --target-shape layers=24,heads=12,ffn=2048,hidden=640",
        )
    recipe = "cut" if recipe == "exact" else recipe
    return recipe, options | {"cut.shape": target_shape}


def check_order(order: Order) -> Recipe:
    """Everything that can be refused before the model is read."""
    recipe = find_recipe(order.recipe)
    recipe = recipe.with_kv_cache() if order.kv_cache else recipe
    recipe.check_options(order.options, order.adapters)
    Pipeline(recipe.passes(), verify=order.verify)
    target = find_target(order.target)
    target.checked_profile(order.profile)
    target.checked_options(order.target_options)
    if order.out is not None:
        check_folder(order.out, order.force)
    folders = [Path(folder) for folder, _ in MergeAdapters("; ".join(order.adapters)).folders()]
    for file in (order.source, order.calibration, *folders):
        if file is not None and not file.exists():
            raise SourceNotFound(
                f"there is nothing at {file}", where=str(file), fix="check the path"
            )
    return recipe


def check_folder(folder: Path, force: bool) -> None:
    """Refuse a folder that exists or cannot be made; raises OutputExists, OutputNotWritable."""
    check_output(folder.absolute(), force)
    above = next(p for p in folder.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise OutputNotWritable(
            f"the output folder {folder} cannot be written",
            where=str(above),
            expected="a folder that you may write to",
            found="no permission" if above.is_dir() else "a file",
            fix="name a folder under one that you may write to",
        )
