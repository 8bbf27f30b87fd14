"""The `torch` target: a fast callable on the CPU, and a folder that one can be loaded from.

Matmuls and look-ups on encoded weights run on the packed codes; everything else is compiled by
Inductor, once for all batches and lengths, or run eagerly where there is no C++ compiler.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..ir.errors import WrongOption
from ..ir.graph_module import graph_module
from ..ir.program import Program
from ..ir.program_folder import load_program, save_program
from .lower_cpu import lower_for_cpu
from .target import Target

Flat = Callable[..., tuple[Any, ...]]
_COMPILERS = ("inductor", "eager")


def lower(program: Program) -> fx.GraphModule:
    """The program over flat inputs, returning a tuple; weights are buffers, packed where served.

    `meta["choices"]` has one sentence for every encoded weight: what runs it, or why it is dense.
    """
    lowered, sentences = lower_for_cpu(program)
    module = graph_module(lowered)
    module.meta["choices"] = sentences
    return module


def compile_program(program: Program, compiler: str = "inductor") -> Flat:
    """A fast callable of flat inputs; any batch and length without compiling again.

    compiler: "inductor", or "eager" to run the lowered graph as it is (also what is left, with one
    warning, where there is no C++ compiler). The weights are constants from now on.
    """
    if compiler not in _COMPILERS:
        raise WrongOption(
            f"there is no compiler {compiler!r}",
            expected=" or ".join(_COMPILERS),
            found=repr(compiler),
            fix='use compiler="inductor"',
        )
    module = lower(program)
    if compiler == "inductor":
        if _cpp_compiler_works():
            from .compile_inductor import compile_graph

            return compile_graph(module, program)
        warnings.warn(
            "planish runs without Inductor, so slower: no C++ compiler was found (CXX, g++)",
            stacklevel=2,
        )
    return _without_gradients(module)


def _without_gradients(module: fx.GraphModule) -> Flat:
    def run(*flat: Any) -> tuple[Any, ...]:
        with torch.no_grad():
            return module(*flat)

    return run


def _cpp_compiler_works() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return shutil.which(get_cpp_compiler()) is not None
    except (InvalidCxxCompiler, RuntimeError):
        return False


def export(
    program: Program, folder: Path, profile: str, metadata: Mapping[str, Any], **options: Any
) -> None:
    """Write the program, encoded weights as they are, into a folder that is still empty."""
    save_program(program, folder, overwrite=True)


class Loaded:
    """An exported program, called like the model it came from."""

    def __init__(self, program: Program, compiler: str) -> None:
        self.program = program
        self._run = compile_program(program, compiler)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        flat = self.program.flatten_inputs(args, kwargs)
        return self.program.unflatten_outputs(self._run(*flat))


def load(folder: str | Path, compiler: str = "inductor") -> Loaded:
    """Load what the `torch` target exported; nothing is unpickled. Packed for this processor."""
    return Loaded(load_program(folder), compiler)


TARGET = Target(
    name="torch",
    export=export,
    profiles=("cpu",),
    doc="a folder for planish.codegen.torch_cpu.load: graph, packed weights, no pickle",
)

__all__ = ["TARGET", "Loaded", "compile_program", "export", "load", "lower"]
