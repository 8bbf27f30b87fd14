"""Machine code for the launches that a package will make, found by running it on meta tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ir.program import Program
from ..kernels.aot import Compiled, compile_launch
from .package_runner import launch_key
from .row_space import expression

Progress = Callable[[int, int, str], None]


def size_choices(program: Program, lengths: Sequence[int]) -> list[dict[Any, int]]:
    """A number for every symbol of the inputs' shapes: a length, but 1 for the first of several.

    The example's own sizes come first where the program has examples. Numbers stay within what
    the capture allows.
    """
    choices = [_example_sizes(program)] if program.examples else []
    for length in lengths:
        choices.append({})
        for node in program.inputs:
            value = node.meta["val"]
            sizes = value.shape if isinstance(value, Tensor) else ()
            several = sum(isinstance(size, torch.SymInt) for size in sizes) > 1
            for axis, size in enumerate(sizes):
                if isinstance(size, torch.SymInt):
                    wanted = 1 if axis == 0 and several else length
                    choices[-1].setdefault(expression(size), _within(size, wanted))
    unique = {tuple(sorted((str(k), v) for k, v in c.items())): c for c in choices}
    return list(unique.values())


def _example_sizes(program: Program) -> dict[Any, int]:
    sizes: dict[Any, int] = {}
    for node, given in zip(program.inputs, program.examples, strict=True):
        if isinstance(given, Tensor):
            for size, have in zip(node.meta["val"].shape, given.shape, strict=True):
                if isinstance(size, torch.SymInt):
                    sizes.setdefault(expression(size), have)
    return sizes


def _within(size: torch.SymInt, wanted: int) -> int:
    bounds = size.node.shape_env.bound_sympy(size.node.expr)
    low, high = int(max(bounds.lower, 0)), bounds.upper
    wanted = max(wanted, low)
    return wanted if high > wanted else int(high)


def meta_inputs(program: Program, sizes: Mapping[Any, int]) -> list[Any]:
    """The tensors among the inputs, of these sizes, without memory."""
    made: list[Any] = []
    for node in program.inputs:
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            continue
        shape = [
            s if isinstance(s, int) else int(expression(s).xreplace(dict(sizes)))
            for s in value.shape
        ]
        made.append(torch.empty(shape, dtype=value.dtype, device="meta"))
    return made


def recorded(
    forward: Callable[..., Any],
    weights: Mapping[str, Tensor],
    arch: str,
    inputs: Sequence[Any],
) -> list[Any]:
    """The launches that the generated `forward` makes for such inputs; none is made."""
    launches: list[Any] = []

    def run(plan: Any) -> Any:
        launches.extend(launch for launch in plan.launches if 0 not in launch.grid)
        return plan.outputs[0] if len(plan.outputs) == 1 else plan.outputs

    with torch.no_grad():
        forward(run, weights, torch.device("meta"), arch, *inputs)
    return launches


def compile_all(launches: Sequence[Any], arch: str, folder: Path) -> list[dict[str, Any]]:
    """Write binaries/ARCH/ for all distinct launches; returns what the manifest tells of them.

    Each is compiled for what is known of its arguments, and once for arguments that are not
    aligned. Raises KernelDoesNotCompile.
    """
    place = folder / "binaries" / arch
    place.mkdir(parents=True, exist_ok=True)
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for launch in launches:
        key = launch_key(launch)
        ones = tuple(n for n, v in launch.args.items() if type(v) is int and v == 1)
        special = (key, launch.aligned(), ones)
        if special not in found:
            found[special] = _written(compile_launch(launch, arch), key, folder, place)
        if (key, (), ()) not in found:
            found[key, (), ()] = _written(
                compile_launch(launch, arch, hints=False), key, folder, place
            )
    return list(found.values())


def _written(compiled: Compiled, key: str, folder: Path, place: Path) -> dict[str, Any]:
    kind = "cubin" if compiled.ptx else "hsaco"
    digest = hashlib.sha256(compiled.binary).hexdigest()[:16]
    paths = {place / f"{compiled.name}-{digest}.{kind}": compiled.binary}
    if compiled.ptx:
        paths[place / f"{compiled.name}-{digest}.ptx"] = compiled.ptx.encode()
    for path, content in paths.items():
        path.write_bytes(content)
    return {
        "key": key,
        "name": compiled.name,
        "files": [path.relative_to(folder).as_posix() for path in paths],
        "parameters": list(compiled.parameters),
        "signature": dict(compiled.signature),
        "aligned": list(compiled.aligned),
        "ones": list(compiled.ones),
        "near": list(compiled.near),
        "shared": compiled.shared,
        "threads": compiled.threads,
        "num_warps": compiled.num_warps,
    }
