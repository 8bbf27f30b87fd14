"""Compile a launch for an architecture that is not there: PTX and cubin, or GCN assembly and hsaco.

Triton keeps what it compiled in its own cache folder (TRITON_CACHE_DIR).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_source
from triton.runtime.jit import JITFunction

from ..ir.errors import PlanishError
from .launch import Launch
from .occupancy import shared_limit

_TENSOR_MEMORY = 512
"""Columns of tensor memory that a block may have (PTX manual, tcgen05.alloc)."""

_NEAR = 2**31 - 1

Attributes = dict[tuple[int, ...], list[list[Any]]]


class KernelDoesNotCompile(PlanishError):
    """A launch that the compiler refuses, or whose block is larger than the architecture allows."""


class CannotCompileHere(PlanishError):
    """This process runs kernels in the interpreter."""


@dataclass(frozen=True)
class Compiled:
    """Machine code of a launch.

    ptx: text, "" on AMD; assembly: GCN text, "" on NVIDIA; binary: cubin or hsaco. shared: bytes of
    dynamic shared memory. parameters: those passed at run time, in order: without constants and
    without pointers that are not given. aligned: the parameters that must be divisible by 16, ones:
    those that are compiled in as 1, near: pointers into less than 2 GB (AMD). global_scratch,
    profile_scratch: bytes of scratch a block needs in global memory. tensor_memory: columns.
    """

    name: str
    arch: str
    ptx: str
    assembly: str
    binary: bytes
    shared: int
    num_warps: int
    num_stages: int
    warp_size: int
    parameters: tuple[str, ...]
    signature: dict[str, str]
    aligned: tuple[str, ...]
    ones: tuple[str, ...]
    near: tuple[str, ...]
    global_scratch: int
    profile_scratch: int
    tensor_memory: int

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.num_warps * self.warp_size


def compile_launch(launch: Launch, arch: str, hints: bool = True) -> Compiled:
    """Machine code of the launch; nothing is run.

    hints: compile what the JIT would for these very arguments: pointers and integers known to be
    divisible by 16, integers equal to 1 constant, and on AMD pointers known to be into less than
    2 GB. Otherwise what it would compile for arguments of which nothing is known.
    Raises KernelDoesNotCompile, CannotCompileHere, UnknownArch.
    """
    _check_process(launch)
    shared_limit(arch)  # an unknown architecture is refused before it takes time
    ones = _ones(launch) if hints else ()
    aligned = _aligned(launch) if hints else ()
    near = _near(launch) if hints and arch.startswith("gfx") else ()
    signature = {n: "constexpr" if n in ones else t for n, t in launch.signature().items()}
    source = ASTSource(
        fn=launch.kernel,
        signature=signature,
        constexprs={**launch.fixed(), **dict.fromkeys(ones, 1)},
        attrs=_attributes(launch, aligned, near),
    )
    try:
        kernel: Any = compile_source(source, target=_target(arch), options=launch.options)
    except Exception as error:  # the compiler's stages raise whatever they like
        raise _refused(launch, arch, f"{type(error).__name__}: {error}") from error
    _check_size(launch, arch, kernel.metadata)
    return Compiled(
        arch=arch,
        parameters=tuple(name for name, kind in signature.items() if kind != "constexpr"),
        signature=signature,
        aligned=aligned,
        ones=ones,
        near=near,
        **_results(kernel, nvidia=arch.startswith("sm_")),
    )


def _results(kernel: Any, nvidia: bool) -> dict[str, Any]:
    facts = kernel.metadata
    return {
        "name": facts.name,
        "ptx": kernel.asm["ptx"] if nvidia else "",
        "assembly": "" if nvidia else kernel.asm["amdgcn"],
        "binary": kernel.asm["cubin" if nvidia else "hsaco"],
        "shared": facts.shared,
        "num_warps": facts.num_warps,
        "num_stages": facts.num_stages,
        "warp_size": facts.warp_size,
        "global_scratch": facts.global_scratch_size,
        "profile_scratch": facts.profile_scratch_size,
        "tensor_memory": _tensor_memory(facts),
    }


def _check_process(launch: Launch) -> None:
    if knobs.runtime.interpret or not isinstance(launch.kernel, JITFunction):
        raise CannotCompileHere(
            f"{launch.name} cannot be compiled in a process that interprets kernels",
            found="TRITON_INTERPRET is set, or was when the kernel was imported",
            fix="compile in a process of its own, without TRITON_INTERPRET",
        )


def _target(arch: str) -> GPUTarget:
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


def _ones(launch: Launch) -> tuple[str, ...]:
    return tuple(
        parameter.name
        for parameter in launch.kernel.params
        if type(value := launch.args.get(parameter.name)) is int
        and value == 1
        and not parameter.do_not_specialize
    )


def _aligned(launch: Launch) -> tuple[str, ...]:
    aligned = launch.aligned()
    return tuple(
        parameter.name
        for parameter in launch.kernel.params
        if parameter.name in aligned
        and not parameter.do_not_specialize
        and not parameter.do_not_specialize_on_alignment
    )


def _near(launch: Launch) -> tuple[str, ...]:
    """Pointers into storages that 32-bit offsets reach."""
    return tuple(
        name
        for name, value in launch.args.items()
        if isinstance(value, Tensor) and value.untyped_storage().size() <= _NEAR
    )


def _attributes(launch: Launch, aligned: tuple[str, ...], near: tuple[str, ...]) -> Attributes:
    attributes: Attributes = {}
    for place, name in enumerate(launch.kernel.arg_names):
        known = [["tt.divisibility", 16]] if name in aligned else []
        known += [["tt.pointer_range", 32]] if name in near else []
        if known:
            attributes[(place,)] = known
    return attributes


def _check_size(launch: Launch, arch: str, facts: Any) -> None:
    limit = shared_limit(arch)
    if facts.shared > limit:
        raise _refused(launch, arch, f"{facts.shared} bytes of shared memory", f"at most {limit}")
    columns = _tensor_memory(facts)
    if columns > _TENSOR_MEMORY:
        found = f"{columns} columns of tensor memory"
        raise _refused(launch, arch, found, f"at most {_TENSOR_MEMORY}")


def _tensor_memory(facts: Any) -> int:
    return getattr(facts, "tmem_size", 0) or 0


def _refused(launch: Launch, arch: str, found: str, expected: str = "") -> KernelDoesNotCompile:
    return KernelDoesNotCompile(
        f"{launch.name} does not compile for {arch}",
        where=described(launch),
        expected=expected,
        found=found,
        fix=f"use other tiles for {arch}" if expected else "",
    )


def described(launch: Launch) -> str:
    """The launch's constants, warps and stages: BM=64,FINISH=standard,w4,s3."""
    named = {k: getattr(v, "__name__", v) for k, v in sorted(launch.constants.items())}
    tiles = [f"{name}={value}" for name, value in named.items()]
    return ",".join([*tiles, f"w{launch.num_warps}", f"s{launch.num_stages}"])
