"""`planish export`: check everything that can be checked, then capture, optimize and write."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .api import Optimized, optimize, trace
from .calibration import calibration_batches
from .cli_lists import describe_contract
from .cli_order import Order, check_order
from .cli_print import megabytes, progress_bar, show, table, working
from .codegen.target import find_target
from .decoder_source import DecoderSource
from .ir.errors import WrongOption
from .ir.program import Program
from .passes.contract import Pass
from .passes.pipeline import Pipeline
from .passes.quantize_weights import QuantizeWeights


def plan_export(order: Order) -> dict[str, Any]:
    """Print what an export would do; capture the model, but run and write nothing."""
    recipe = check_order(order)
    program = _capture(order)
    dense = "dense_weights" in program.facts
    steps = recipe.with_adapters(order.adapters, dense).passes(order.options)
    calibrated = order.calibration is not None
    Pipeline(steps, verify=order.verify).check_order(program.facts, calibrated)
    sizes = expected_sizes(program, steps)
    profile = find_target(order.target).checked_profile(order.profile)
    rows = [
        [
            str(number),
            step.pass_name(),
            ", ".join(f"{k}={v}" for k, v in step.options().items()),
            step.contract.fidelity.value,
        ]
        for number, step in enumerate(steps, 1)
    ]
    show(table(["", "pass", "options", "contract"], rows, f"plan: recipe {recipe.name}"))
    show(
        f"{program.parameter_count():,} parameters; weights {megabytes(sizes['before'])} now, "
        f"about {megabytes(sizes['after'])} after\n"
        f"would write {order.out or 'nothing (no --out)'} for {order.target}, "
        f"profile {profile}; nothing was written"
    )
    return {
        "dry_run": True,
        "recipe": recipe.name,
        "target": order.target,
        "profile": profile,
        "passes": [
            {
                "name": step.pass_name(),
                "options": step.options(),
                "contract": describe_contract(step.contract),
            }
            for step in steps
        ],
        "parameters": program.parameter_count(),
        "nbytes": sizes,
    }


def export_model(order: Order) -> dict[str, Any]:
    """Capture, optimize and write; returns what was done, with times and sizes."""
    recipe = check_order(order)
    if order.out is None:
        raise WrongOption(
            "no output folder is named", expected="--out DIR", fix="add --out, or use --dry-run"
        )
    seconds: dict[str, float] = {}
    begun = time.perf_counter()
    program = _capture(order)
    seconds["capture"] = time.perf_counter() - begun
    source = DecoderSource.of(order.source) if order.calibration else None
    batches = calibration_batches(program, order.calibration, source, order.slicing)
    begun = time.perf_counter()
    with progress_bar(f"optimize ({recipe.name})") as advance:
        optimized = optimize(
            program,
            recipe=recipe,
            kv_cache=order.kv_cache,
            calibration=batches,
            options=order.options,
            verify=order.verify,
            adapters=order.adapters,
            progress=advance,
        )
    if order.kv_cache:
        optimized.source = DecoderSource.of(order.source)  # the program no longer knows it
    seconds["optimize"] = time.perf_counter() - begun
    begun = time.perf_counter()
    with working(f"write {order.out}"):
        written = optimized.export(
            order.out,
            target=order.target,
            profile=order.profile,
            force=order.force,
            options=order.target_options,
        )
    seconds["write"] = time.perf_counter() - begun
    return _told(order, program, optimized, written, seconds)


def _told(
    order: Order,
    program: Program,
    optimized: Optimized,
    written: Path,
    seconds: dict[str, float],
) -> dict[str, Any]:
    files = folder_files(written)
    show(str(optimized.history))
    show(
        f"{written}: {megabytes(sum(files.values()))} in {len(files)} files; weights "
        f"{megabytes(program.nbytes())} -> {megabytes(optimized.program.nbytes())}; "
        + ", ".join(f"{what} {spent:.1f} s" for what, spent in seconds.items())
        + f"; peak memory {megabytes(peak_memory())}"
    )
    return {
        "dry_run": False,
        "recipe": optimized.recipe.name,
        "options": order.options,
        "target": order.target,
        "profile": order.profile,
        "out": str(written),
        "files": files,
        "parameters": optimized.program.parameter_count(),
        "nbytes": {"before": program.nbytes(), "after": optimized.program.nbytes()},
        "seconds": seconds,
        "peak_memory": peak_memory(),
        "history": optimized.history.to_json(),
    }


def _capture(order: Order) -> Program:
    with working(f"capture {order.source}"):
        return trace(order.source, kv_cache=order.kv_cache, keep_codes=order.keep_codes)


def expected_sizes(program: Program, steps: Sequence[Pass]) -> dict[str, int]:
    """Bytes of the weights now and after the quantizing steps, from shapes alone.

    Raises UnsupportedGroupSize as the run would.
    """
    before = after = program.nbytes()
    for step in steps:
        if isinstance(step, QuantizeWeights):
            after += step.expected_change(program)
    return {"before": before, "after": after}


def folder_files(folder: Path) -> dict[str, int]:
    """Every file below a folder, with its size in bytes."""
    return {
        str(file.relative_to(folder)): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def peak_memory() -> int:
    """The most memory that this process has had resident, in bytes.

    Linux carries a parent's peak over into getrusage of its child, so the kernel's own mark of
    this process is preferred.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
