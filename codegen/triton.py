"""The Triton target: a folder of kernels, machine code and weights; needs only torch and triton.

The folder holds model.py (the program, a line an operation), generated.py (fused kernels), the
named kernels it calls, binaries for each architecture, weights.safetensors, buffers.json and
runner.py, whose `load(folder)(inputs)` runs it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..ir.errors import UnknownOption, WrongOption
from ..ir.program import Program
from ..ir.write_safetensors import Planned, write_safetensors
from ..kernels.triton_spec import ARCHS, TRITON
from ..kernels.triton_version import check_triton
from . import package_runner
from .buffer_plan import buffer_plan
from .extract_source import extract
from .lower_triton import TritonLowering, lower_for_triton
from .package_runner import FORMAT
from .package_runner import load as load_package
from .target import Target
from .triton_binaries import compile_all, meta_inputs, recorded, size_choices
from .triton_model import GENERATED_ROOTS, ModelSource, model_source

WEIGHTS = "weights.safetensors"


def export(
    program: Program,
    folder: Path,
    profile: str,
    metadata: Mapping[str, Any],
    arch: tuple[str, ...] = ("sm_80", "sm_90"),
    lengths: tuple[int, ...] = (1, 512),
) -> Mapping[str, Any]:
    """Write the package into an empty folder; returns the manifest's section "triton".

    arch: architectures to compile for; lengths: sizes of the free axes whose launches are compiled
    ahead of time (others are compiled when they come up). Raises UnsupportedByTarget,
    KernelDoesNotCompile, MissingExtra, WrongTriton.
    """
    check_triton()
    lowering = lower_for_triton(program, arch)
    source = model_source(lowering.program)
    modules = write_sources(source, folder)
    write_weights(lowering.program, folder / WEIGHTS)
    choices = size_choices(lowering.program, lengths)
    (folder / "buffers.json").write_text(_buffers(lowering.program, choices), encoding="utf-8")
    binaries, counted = _compiled(lowering.program, folder, modules, arch, choices)
    return {
        "triton": {
            "format": FORMAT,
            "triton": TRITON,
            "archs": list(arch),
            "modules": modules,
            "weights": WEIGHTS,
            "input_dtypes": {
                node.name: str(node.meta["val"].dtype)
                for node in lowering.program.inputs
                if isinstance(node.meta["val"], torch.Tensor)
            },
            "launches": counted,
            "generated": source.kernels,
            "notes": lowering.sentences,
            "binaries": binaries,
        }
    }


def write_sources(source: ModelSource, folder: Path) -> list[str]:
    """Write all modules of a package; returns their names in the order in which they are loaded."""
    kernels = extract([*GENERATED_ROOTS, *source.roots])
    (folder / "kernels").mkdir()
    texts = {f"kernels/{name}.py": text for name, text in kernels.items()}
    texts |= {"generated.py": source.generated, "model.py": source.model}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    shutil.copyfile(package_runner.__file__, folder / "runner.py")
    return list(texts)


def write_weights(program: Program, path: Path) -> None:
    """Every weight that the graph reads, a tensor at a time."""
    weights = program.weights
    names = dict.fromkeys(str(node.target) for node in program.weight_nodes())

    def planned(name: str) -> Planned:
        shape, dtype = tuple(weights.shape(name)), weights.dtype(name)
        return Planned(shape, dtype, lambda: weights[name].contiguous())

    write_safetensors(path, {name: planned(name) for name in names})


def _buffers(program: Program, choices: Sequence[Mapping[Any, int]]) -> str:
    import json

    return json.dumps(buffer_plan(program, choices[0] if choices else {}), indent=1) + "\n"


def _compiled(
    program: Program,
    folder: Path,
    modules: Sequence[str],
    archs: Sequence[str],
    choices: Sequence[Mapping[Any, int]],
) -> tuple[dict[str, Any], dict[str, int]]:
    """What was compiled for each architecture, and how often each kernel is launched."""
    forward = package_runner._import(folder, modules).forward
    weights = {
        str(node.target): torch.empty_like(node.meta["val"], device="meta")
        for node in program.weight_nodes()
    }
    binaries: dict[str, Any] = {}
    counted: dict[str, int] = {}
    for arch in archs:
        launches: list[Any] = []
        for sizes in choices or [{}]:
            made = recorded(forward, weights, arch, meta_inputs(program, sizes))
            if not counted:
                for launch in made:
                    counted[launch.name] = counted.get(launch.name, 0) + 1
            launches += made
        binaries[arch] = compile_all(launches, arch, folder)
    return binaries, counted


def _archs(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in ARCHS:
            raise UnknownOption.named(name, ARCHS, "arch of target triton")
    if not names:
        raise WrongOption("no architecture is named", expected=",".join(ARCHS), found=repr(text))
    return names


def _lengths(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in str(text).split(",") if part.strip())
    except ValueError:
        numbers = (0,)
    if any(number < 1 for number in numbers):
        raise WrongOption(
            "lengths of target triton are numbers of tokens",
            expected="positive numbers with commas between, such as 1,16,512",
            found=repr(text),
        )
    return numbers


TARGET = Target(
    name="triton",
    export=export,
    profiles=("gpu",),
    doc="a folder for a GPU: Triton source, machine code, weights; runner.load(folder)(inputs)",
    open_options={"arch": ("sm_80,sm_90", _archs), "lengths": ("1,512", _lengths)},
)

__all__ = ["TARGET", "TritonLowering", "export", "load_package", "write_sources"]
