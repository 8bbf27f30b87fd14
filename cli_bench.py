"""`planish bench MODEL`: a model's speed by measurement; `planish bench kernels`: without a GPU.

Of the GPU kernels bytes, operations, machine code and bounds are told; no times, because nothing
is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from .cli_print import check_json_target, err, show, speaking_plainly, table, write_json

if TYPE_CHECKING:
    from .kernels.launch import Config, Launch
    from .kernels.triton_spec import Form, TritonSpec


class _ModelByDefault(TyperGroup):
    """What is no command is a model: `planish bench MODEL` is `planish bench model MODEL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = ["model", *args]
        return super().parse_args(ctx, args)


bench = typer.Typer(cls=_ModelByDefault, help="What can be said about speed.", no_args_is_help=True)

ARCHS_BOUNDED = ("sm_80", "sm_90")


@bench.callback()
def root() -> None:
    """What can be said about speed."""


@bench.command()
def model(
    source: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A Hugging Face folder, or a .gguf file.")
    ],
    recipe: Annotated[
        list[str] | None, typer.Option(help="A recipe's name, or a YAML file; repeatable.")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="onnx, torch (the C decoder; Inductor of an encoder); repeatable."),
    ] = None,
    activations: Annotated[
        str | None, typer.Option(help="int8: round activations too, where weights are packed.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A text to calibrate with.")
    ] = None,
    threads: Annotated[list[int] | None, typer.Option(help="Repeatable.")] = None,
    rounds: Annotated[int, typer.Option(metavar="N", help="Rounds of every measure.")] = 5,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Inductor or onnxruntime beside eager; repeatable."),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="All lengths and batches of planish's own benchmark.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write JSON lines, tables, pictures here.")
    ] = None,
) -> None:
    """Measure a model before and after recipes: speed, quality, memory, against eager PyTorch.

    Each contestant runs in a process of its own and they take turns. A recipe that needs
    calibration looks at --calibration, or at the beginning of the demo's text.
    """
    with speaking_plainly():
        from .bench_model import Asked, bench_model

        asked = Asked(
            source=source,
            recipes=tuple(recipe or ["exact"]),
            targets=tuple(target or ["onnx"]),
            activations=activations,
            calibration=calibration,
            threads=tuple(threads or [1]),
            rounds=rounds,
            against=tuple(against or ()),
            full=full,
            out=out,
        )
        show(bench_model(asked, lambda what: err.print(what)))


@bench.command()
def kernels(
    kernel: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this kernel; repeatable.")
    ] = None,
    arch: Annotated[
        list[str] | None,
        typer.Option(metavar="ARCH", help="Compile for this (sm_80, sm_90); repeatable."),
    ] = None,
    model: Annotated[
        bool, typer.Option("--model/--no-model", help="Bounds too, beside published records.")
    ] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON too.")
    ] = None,
) -> None:
    """Bytes, operations, machine code and bounds of the GPU kernels, without a GPU.

    Every figure is counted or a bound; none is measured.
    """
    with speaking_plainly():
        check_json_target(json_file)
        write_json(json_file, bench_kernels(kernel or [], arch or [*ARCHS_BOUNDED], model))


def bench_kernels(names: Sequence[str], archs: Sequence[str], model: bool = True) -> dict[str, Any]:
    """Print the tables; the same as data. Raises UnknownName, UnknownArch."""
    from .kernels.occupancy import UnknownArch
    from .kernels.peaks import LABEL
    from .kernels.triton_spec import ARCHS

    for arch in archs:
        if arch not in ARCHS:
            raise UnknownArch.named(arch, ARCHS)
    specs = _specs(names)
    calls = [_call(spec, form) for spec in specs for form in spec.forms]
    code = [row for spec in specs for row in _code(spec, archs)]
    result: dict[str, Any] = {"label": LABEL, "calls": calls, "code": code}
    _show_calls(calls, model)
    _show_code(code, model)
    if model:
        result["published"] = _show_published(specs)
    return result


def _specs(names: Sequence[str]) -> list[TritonSpec]:
    from .ir.errors import UnknownName
    from .kernels.catalog import triton_kernels

    known = triton_kernels()
    for name in names:
        if name not in known:
            raise UnknownName.named(name, known)
    return [known[name] for name in names] or [*known.values()]


def _call(spec: TritonSpec, form: Form) -> dict[str, Any]:
    """What a call of the form costs whatever the kernel."""
    from .kernels.peaks import GPUS, ideal_time, intensity

    cost = spec.cost(**form.make())
    bounds = [ideal_time(cost, gpu, form.expects) for gpu in GPUS if form.serves(gpu.arch)]
    return {
        "kernel": spec.name,
        "form": form.name,
        "bytes": cost.nbytes,
        "operations": cost.flops,
        "intensity": intensity(cost),
        "ideal": {bound.gpu: asdict(bound) for bound in bounds if bound is not None},
    }


def _code(spec: TritonSpec, archs: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The machine code of every form, architecture and configuration that go together."""
    for form in spec.forms:
        for arch in archs:
            arguments = form.make()
            if not form.serves(arch) or spec.why_not(arch, **arguments) is not None:
                continue
            for config in (config for config in spec.configs if config.serves(arch)):
                err.print(f"{spec.name}: {form.name}, {config.name}, {arch}")
                for launch in spec.plan(**arguments, config=config, arch=arch).launches:
                    yield _compiled(spec, form, config, arch, launch)


def _compiled(
    spec: TritonSpec, form: Form, config: Config, arch: str, launch: Launch
) -> dict[str, Any]:
    from .kernels.aot import compile_launch
    from .kernels.machine_code import read_machine_code
    from .kernels.occupancy import occupancy
    from .kernels.pipe_bound import pipe_bound

    compiled = compile_launch(launch, arch)
    code = read_machine_code(compiled)
    bound = pipe_bound(code, compiled.threads)
    fits = None
    if arch.startswith("sm_"):
        fits = asdict(occupancy(arch, code.registers, compiled.shared, compiled.threads))
    return {
        "kernel": spec.name,
        "form": form.name,
        "launch": launch.name,
        "config": config.name,
        "arch": arch,
        "registers": code.registers,
        "spills": code.spills,
        "shared": compiled.shared,
        "occupancy": fits,
        "matrix": code.matrix,
        "bound": None if bound is None else asdict(bound),
    }


def _show_calls(calls: list[dict[str, Any]], model: bool) -> None:
    from .kernels.peaks import GPUS, LABEL

    gpus = [gpu.name for gpu in GPUS] if model else []
    rows = [
        [
            call["kernel"],
            call["form"],
            f"{call['bytes'] / 1e6:,.1f}",
            f"{call['operations'] / 1e9:,.2f}",
            f"{call['intensity']:,.1f}",
            *(_microseconds(call["ideal"].get(gpu)) for gpu in gpus),
        ]
        for call in calls
    ]
    columns = ["kernel", "form", "MB", "GFLOP", "FLOP/B", *(f"{gpu}, us" for gpu in gpus)]
    title = "Least bytes and operations of a call"
    title += f"; no call is faster than (m: memory, a: arithmetic; {LABEL})" if gpus else ""
    show(table(columns, rows, title))


def _microseconds(ideal: dict[str, Any] | None) -> str:
    return "-" if ideal is None else f"≥ {ideal['seconds'] * 1e6:,.1f} {ideal['by'][0]}"


def _show_code(code: list[dict[str, Any]], model: bool) -> None:
    from .kernels.peaks import LABEL

    columns = ["launch", "form", "config", "arch", "registers", "spills", "shared, KB", "occupancy"]
    columns += ["inner loop", "no faster than"] if model else ["inner loop"]
    rows = [
        [
            row["launch"],
            row["form"],
            row["config"],
            row["arch"],
            str(row["registers"]),
            str(row["spills"]),
            f"{row['shared'] / 1024:.1f}",
            _occupancy(row["occupancy"]),
            ", ".join(f"{number} {kind}" for kind, number in row["matrix"].items()) or "-",
            *([_rate(row["bound"])] if model else []),
        ]
        for row in code
    ]
    title = "Machine code"
    show(
        table(
            columns, rows, f"{title}; bounds by pipe of the inner loop: {LABEL}" if model else title
        )
    )


def _occupancy(fits: dict[str, Any] | None) -> str:
    return (
        "-" if fits is None else f"{100 * fits['fraction']:.0f} % ({', '.join(fits['limiters'])})"
    )


def _rate(bound: dict[str, Any] | None) -> str:
    if bound is None:
        return "-"
    return f"≤ {bound['rate'] / 1e12:,.0f} TFLOP/s on {bound['gpu']} ({bound['limiter']})"


def _show_published(specs: Sequence[TritonSpec]) -> list[dict[str, object]]:
    from .kernels.published import records_for

    records = list(dict.fromkeys(record for spec in specs for record in records_for(spec.name)))
    if records:
        rows = [[record.what, record.gpu, record.figure, record.source] for record in records]
        title = "Published by others of such kernels, measured by them"
        show(table(["what", "GPU", "figure", "read in"], rows, title))
    return [record.to_json() for record in records]
