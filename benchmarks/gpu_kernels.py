"""On a machine with a GPU: is every kernel right there, and how long do its calls take.

    python benchmarks/gpu_kernels.py [--kernel NAME ...] [--json FILE]

Numbers: every case of every kernel, judged as without a GPU, against the float64 twin. Times: every
form with every configuration, beside torch's own operation on the same shapes: flash attention and
FlexAttention; matmuls in the form's dtype, int8 and fp8: medians of triton.testing.do_bench, which
clears the L2 cache between runs. The JSON names the device. Without a GPU it says so and ends.

This file was written without a GPU: only that last path has ever been run.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from planish.ir.errors import PlanishError
from planish.kernels.catalog import triton_kernels
from planish.kernels.ladder_judge import judge
from planish.kernels.operator import this_arch
from planish.kernels.peaks import GPUS, ideal_time
from planish.kernels.triton_spec import Case, Form, TritonSpec
from torch import Tensor

Call = Callable[[], Any]
SEED = 0


def moved(value: Any) -> Any:
    """On the GPU with the same strides: the whole storage is copied, also under slices."""
    if isinstance(value, (tuple, list)):
        return type(value)(moved(part) for part in value)
    if not isinstance(value, Tensor):
        return value
    flat = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    return flat.cuda().as_strided(value.shape, value.stride(), value.storage_offset())


def filled(value: Any) -> Any:
    """A tensor of the meta device, with numbers on the GPU; the strides stay."""
    if not isinstance(value, Tensor):
        return value
    size = value.untyped_storage().nbytes() // value.element_size()
    if value.dtype == torch.bool:
        flat = torch.ones(size, dtype=torch.bool, device="cuda")
    elif value.is_floating_point():
        flat = torch.randn(size, device="cuda").to(value.dtype)
    else:
        flat = torch.randint(0, 127, (size,), device="cuda").to(value.dtype)
    return flat.as_strided(value.shape, value.stride(), value.storage_offset())


def check_case(spec: TritonSpec, case: Case, arch: str) -> dict[str, Any]:
    """Launch one case and judge its results."""
    arguments = case.make(torch.Generator().manual_seed(SEED))
    found = {"kernel": spec.name, "case": case.name}
    refused = spec.why_not(arch, **arguments)
    if refused is not None or (case.config and not case.config.serves(arch)):
        return {**found, "skipped": refused or "its tiles are for other architectures"}
    on_gpu = {name: moved(value) for name, value in arguments.items()}
    plan = spec.plan(**on_gpu, config=case.config, arch=arch)
    plan.run()
    torch.cuda.synchronize()
    judged = judge(spec, case, arguments, [output.cpu() for output in plan.outputs])
    return {**found, "right": judged.right, "sentence": judged.sentence}


def time_form(spec: TritonSpec, form: Form, arch: str) -> Iterator[dict[str, Any]]:
    """Median milliseconds of a form: planish's configurations, then the baselines."""
    arguments = form.make()
    found = {"kernel": spec.name, "form": form.name}
    skipped = spec.why_not(arch, **arguments) if form.serves(arch) else "it is for other GPUs"
    if any(_is_index(value) for value in arguments.values()):
        skipped = skipped or "its lengths or page numbers would have to be real"
    if skipped:
        yield {**found, "skipped": skipped}
        return
    real = {name: filled(value) for name, value in arguments.items()}
    ideals = {gpu.arch: ideal_time(spec.cost(**arguments), gpu, form.expects) for gpu in GPUS}
    if ideal := ideals.get(arch):
        yield {**found, "what": f"bound, not measured ({ideal.gpu})", "ms": ideal.seconds * 1e3}
    for config in (config for config in spec.configs if config.serves(arch)):
        plan = spec.plan(**real, config=config, arch=arch)
        yield {**found, "what": config.name, "ms": milliseconds(plan.run)}
    for name, call in baselines(spec, real).items():
        try:
            yield {**found, "what": name, "ms": milliseconds(call)}
        except (RuntimeError, TypeError) as error:  # torch has no such kernel here
            yield {**found, "what": name, "skipped": str(error).splitlines()[0]}


def _is_index(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64)


def milliseconds(call: Call) -> float:
    from triton.testing import do_bench

    median: Any = do_bench(call, return_mode="median")
    return median


def baselines(spec: TritonSpec, arguments: dict[str, Any]) -> dict[str, Call]:
    """torch's own calls for the same shapes."""
    if {"q", "k", "v"} <= arguments.keys() and "attention" in spec.name:
        return attention_baselines(arguments)
    if spec.name.startswith("linear"):
        outputs = spec.plan(**arguments, arch=this_arch()).outputs
        return matmul_baselines(arguments["x"], outputs[0].shape[-1])
    return {}


def attention_baselines(arguments: dict[str, Any]) -> dict[str, Call]:
    """Plain and causal attention only: neither masks nor windows are given to the baselines."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = arguments["q"], arguments["k"], arguments["v"]
    options: dict[str, Any] = {"scale": arguments["scale"], "enable_gqa": True}
    causal = bool(arguments.get("causal", False))

    def flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, **options)

    def not_later(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return row >= column

    mask = None
    if causal:
        mask = create_block_mask(not_later, None, None, q.shape[2], k.shape[2], device="cuda")
    compiled = torch.compile(flex_attention)
    kind = "causal" if causal else "full"
    return {
        f"SDPA flash, {kind}": flash,
        f"FlexAttention, {kind}": lambda: compiled(q, k, v, block_mask=mask, **options),
    }


def matmul_baselines(x: Tensor, width: int) -> dict[str, Call]:
    """x [..., length] times [length, width]: in x's dtype, bfloat16, int8 and fp8."""
    rows = x.reshape(-1, x.shape[-1])
    shape = (width, rows.shape[1])
    dense = torch.randn(shape, device="cuda")
    own = rows.dtype if rows.is_floating_point() and rows.itemsize > 1 else torch.bfloat16
    brain = rows.to(torch.bfloat16), dense.to(torch.bfloat16)
    whole = rows.to(torch.int8), dense.to(torch.int8).t()
    eight = rows.to(torch.float8_e4m3fn), dense.to(torch.float8_e4m3fn).t()
    one = torch.ones((), device="cuda")
    pair = rows.to(own), dense.to(own)
    return {
        f"matmul {str(own).removeprefix('torch.')}": lambda: F.linear(*pair),
        "matmul bfloat16": lambda: F.linear(*brain),
        "torch._int_mm": lambda: torch._int_mm(*whole),
        "torch._scaled_mm": lambda: torch._scaled_mm(
            *eight, scale_a=one, scale_b=one, out_dtype=torch.bfloat16
        ),
    }


def run(names: list[str]) -> dict[str, Any]:
    arch = this_arch()
    kernels = triton_kernels()
    specs = [kernels[name] for name in names] or list(kernels.values())
    device = torch.cuda.get_device_name()
    print(f"{device} ({arch}), torch {torch.__version__}")
    result: dict[str, Any] = {"device": device, "arch": arch, "torch": torch.__version__}
    result["cases"], result["times"] = [], []
    for spec in specs:
        for case in spec.cases:
            one = functools.partial(check_case, spec, case, arch)
            result["cases"] += _guarded(spec.name, case.name, lambda one=one: [one()])
        for form in spec.forms:
            rows = functools.partial(time_form, spec, form, arch)
            result["times"] += _guarded(spec.name, form.name, lambda rows=rows: list(rows()))
    return result


def _guarded(kernel: str, what: str, call: Callable[[], list[dict[str, Any]]]) -> list[Any]:
    """One kernel that fails to launch does not keep the others from being tried."""
    try:
        rows = call()
    except (PlanishError, RuntimeError) as error:
        rows = [{"kernel": kernel, "what": what, "failed": f"{type(error).__name__}: {error}"}]
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", action="append", default=[], metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no GPU here, so nothing was run.")
        return 0
    result = run(asked.kernel)
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return int(any(row.get("right") is False or "failed" in row for row in result["cases"]))


if __name__ == "__main__":
    sys.exit(main())
