"""A Triton kernel of one's own, verified on a machine without a GPU:

    planish verify-kernel examples/verify_a_kernel.py

Rows are brought to length one, as attention does with its queries and keys (Henry et al. 2020).
"""

import torch
import triton
import triton.language as tl
from planish.kernels.launch import Config, Launch, Plan
from planish.kernels.operator import define
from planish.kernels.spec import Cost
from planish.kernels.triton_spec import Case, Form, TritonSpec


@triton.jit
def unit_rows_kernel(X, OUT, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x = tl.load(X + row * stride + at, mask=at < columns, other=0.0).to(tl.float32)
    out = x / tl.sqrt(tl.sum(x * x, axis=0))
    tl.store(OUT + row * columns + at, out.to(OUT.dtype.element_ty), mask=at < columns)


def unit_rows(x):
    """What the kernel shall compute, in any precision; its reference is this in float64."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide / (wide * wide).sum(-1, keepdim=True).sqrt()).to(x.dtype)


def plan(x, *, config=None, arch="sm_80"):
    """x [rows, columns]: what is allocated and launched; it looks at shapes, never at numbers."""
    rows, columns = x.shape
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    args = {"X": x, "OUT": out, "columns": columns, "stride": x.stride(0)}
    block = {"BLOCK": triton.next_power_of_2(columns)}
    launch = Launch(unit_rows_kernel, (rows,), args, block)
    return Plan((out,), (launch.with_config(config or CONFIGS[0]),))


def small(dtype):
    """Rows of 300 that lie 311 apart, of values whose squares float16 does not hold."""
    return lambda generator: {
        "x": (torch.randn(5, 311, generator=generator) * 400).to(dtype)[:, :300]
    }


CONFIGS = (Config({}, num_warps=4), Config({}, num_warps=8))
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
SPEC = TritonSpec(
    name="unit_rows",
    schema="example::unit_rows(Tensor x) -> Tensor",
    serves="rows of length one",
    twin=unit_rows,
    plan=plan,
    configs=CONFIGS,
    why_not=lambda arch, x: None if x.stride(-1) == 1 else "its columns do not lie side by side",
    cost=lambda x: Cost(nbytes=2 * x.numel() * x.element_size(), flops=4 * x.numel()),
    cases=tuple(Case(name, small(dtype)) for name, dtype in DTYPES.items()),
    forms=(Form("4096 x 4096", lambda: {"x": torch.empty(4096, 4096, device="meta")}),),
)
define(SPEC)
