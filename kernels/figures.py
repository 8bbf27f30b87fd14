"""The figures of a kernel's machine code, for every form, configuration and architecture."""

from __future__ import annotations

import importlib
import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from ..ir.errors import PlanishError
from .aot import KernelDoesNotCompile, compile_launch
from .launch import Config, Launch
from .machine_code import read_machine_code
from .occupancy import occupancy
from .triton_spec import ARCHS, Arguments, Form, TritonSpec

MOST_PROCESSES = 2
_WIDE = 16


@dataclass(frozen=True)
class Figures:
    """regs: of a thread; stack: bytes; spills: instructions (AMD: registers); smem: bytes of a
    block; mma: matrix instructions of the inner loop by family; wide: loads of 128 bits or more;
    copies: asynchronous ones; prmt: byte permutations in the inner loop; warps: resident on a
    multiprocessor (AMD: waves on a SIMD unit).
    """

    regs: int
    stack: int = 0
    spills: int = 0
    smem: int = 0
    mma: Mapping[str, int] = field(default_factory=dict[str, int])
    wide: int = 0
    copies: int = 0
    prmt: int = 0
    warps: int = 0

    def to_json(self) -> dict[str, Any]:
        """What is zero is left out."""
        return {name: value for name, value in asdict(self).items() if value}


@dataclass(frozen=True)
class Entry:
    """What was compiled. hints: whether divisibility was known."""

    kernel: str
    form: str
    config: str
    arch: str
    hints: bool

    def key(self, launch: str = "") -> str:
        kernel = f"{self.kernel}/{launch}" if launch else self.kernel
        hints = "hints" if self.hints else "no hints"
        return " | ".join((kernel, self.form, self.config, self.arch, hints))


@dataclass(frozen=True)
class Measured:
    """launches: figures by the launch's key in the budget; failure: why it does not compile.

    unaligned: keys of launches that read or write rows which do not begin at multiples of 16 bytes,
    so that no hint makes their loads wide, or of which the form asks for no wide loads.
    """

    entry: Entry
    expects: str
    launches: Mapping[str, Figures]
    failure: str = ""
    unaligned: frozenset[str] = frozenset()


def measure(spec: TritonSpec, archs: Sequence[str] = ARCHS) -> list[Measured]:
    """Compile every form with every configuration for every architecture that they serve, and that
    the kernel does not refuse. Nothing is run.
    """
    return [
        _measure_one(spec, form, arguments, config, arch, hints)
        for form in spec.forms
        for arch in archs
        if form.serves(arch) and spec.why_not(arch, **(arguments := form.make())) is None
        for config in spec.configs
        if config.serves(arch)
        for hints in (True, False)
    ]


def measure_shipped(
    names: Iterable[str],
    archs: Sequence[str] = ARCHS,
    processes: int = 1,
    done: Callable[[str], None] = lambda line: None,
) -> list[Measured]:
    """Of kernels of this folder by name, in up to two processes. done: called with progress."""
    orders = [(name, arch) for name in names for arch in archs]
    measured: list[Measured] = []
    if processes == 1:
        results = map(_measure_order, orders)
        measured += _collected(orders, results, done)
    else:
        spawn = multiprocessing.get_context("spawn")
        workers = min(processes, MOST_PROCESSES)
        with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
            measured += _collected(orders, pool.map(_measure_order, orders), done)
    return measured


def shipped(name: str) -> TritonSpec:
    """The kernel in kernels/NAME.py."""
    return importlib.import_module(f".{name}", __package__).SPEC


def figures_of(launch: Launch, arch: str, hints: bool) -> Figures:
    """Raises KernelDoesNotCompile and what else compile_launch and read_machine_code raise."""
    compiled = compile_launch(launch, arch, hints)
    code = read_machine_code(compiled)
    warps = code.waves
    if arch.startswith("sm_"):
        warps = occupancy(arch, code.registers, compiled.shared, compiled.threads).warps
    return Figures(
        regs=code.registers,
        stack=code.stack,
        spills=code.spills,
        smem=compiled.shared,
        mma=code.matrix,
        wide=code.counts.get("wide loads", 0),
        copies=code.counts.get("async copies", 0),
        prmt=code.loop_counts.get("prmt", 0),
        warps=warps,
    )


def _measure_order(order: tuple[str, str]) -> list[Measured]:
    name, arch = order
    return measure(shipped(name), (arch,))


def _collected(
    orders: list[tuple[str, str]],
    results: Iterable[list[Measured]],
    done: Callable[[str], None],
) -> list[Measured]:
    measured: list[Measured] = []
    for (name, arch), found in zip(orders, results, strict=True):
        done(f"{name} {arch}: {len(found)} compiled")
        measured += found
    return measured


def _measure_one(
    spec: TritonSpec, form: Form, arguments: Arguments, config: Config, arch: str, hints: bool
) -> Measured:
    entry = Entry(spec.name, form.name, config.name, arch, hints)
    try:
        launches = spec.plan(**arguments, config=config, arch=arch).launches
        named = dict(zip(map(entry.key, _names(launches)), launches, strict=True))
        figures = {key: figures_of(launch, arch, hints) for key, launch in named.items()}
    except PlanishError as error:
        return Measured(entry, form.expects, {}, failure=_why(error))
    narrow = (key for key, made in named.items() if not (form.wide and _aligned_rows(made)))
    unaligned = frozenset(narrow)
    return Measured(entry, form.expects, figures, unaligned=unaligned)


def _aligned_rows(launch: Launch) -> bool:
    return all(
        step * tensor.element_size() % _WIDE == 0
        for tensor in launch.args.values()
        if isinstance(tensor, Tensor)
        for step, size in zip(tensor.stride(), tensor.shape, strict=True)
        if size > 1 and step != 1
    )


def _why(error: PlanishError) -> str:
    if isinstance(error, KernelDoesNotCompile):
        limit = f" ({error.expected})" if error.expected else ""
        return error.found.strip().splitlines()[-1] + limit
    return error.what


def _names(launches: Sequence[Launch]) -> list[str]:
    """Of the launches of one plan: none for an only one, else place and kernel."""
    if len(launches) == 1:
        return [""]
    return [f"{place}:{launch.name}" for place, launch in enumerate(launches)]
