"""A small matmul kernel with a spec of its own, for tests of what is said about machine code."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from planish.kernels.launch import Config, Launch, Plan
from planish.kernels.spec import Cost
from planish.kernels.triton_spec import Form, TritonSpec


@triton.jit
def tiny_matmul_kernel(
    A,
    B,
    BIAS,
    OUT,
    columns,
    inner,
    a_row,
    a_column,
    b_row,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    sums = tl.zeros([BM, BN], tl.int32 if A.dtype.element_ty == tl.int8 else tl.float32)
    for start in tl.range(0, inner, BK):
        at = start + tl.arange(0, BK)
        a = tl.load(A + rows[:, None] * a_row + at[None, :] * a_column)
        b = tl.load(B + cols[None, :] * b_row + at[:, None])
        sums = tl.dot(a, b, sums, input_precision="ieee")
    out = sums.to(tl.float32)
    if BIAS is not None:
        out += tl.load(BIAS + cols)[None, :].to(tl.float32)
    tl.store(OUT + rows[:, None] * columns + cols[None, :], out.to(OUT.dtype.element_ty))


SMALL = Config({"BM": 64, "BN": 128, "BK": 64})
SPILLING = Config({"BM": 64, "BN": 128, "BK": 16}, num_warps=1)
TOO_LARGE = Config({"BM": 64, "BN": 64, "BK": 256}, num_stages=4)


def tiny_launch(
    dtype: torch.dtype = torch.float16,
    config: Config = SMALL,
    bias: bool = False,
    inner: int = 512,
) -> Launch:
    """[256, inner] times [inner, 512]; `inner` apart, all is divisible by 16."""

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    args = {
        "A": empty(256, inner),
        "B": empty(512, inner),
        "BIAS": empty(512) if bias else None,
        "OUT": empty(256, 512, of=torch.float32),
        "columns": 512,
        "inner": inner,
        "a_row": inner,
        "a_column": 1,
        "b_row": inner,
    }
    grid = (256 // config.constants["BM"], 512 // config.constants["BN"])
    return Launch(tiny_matmul_kernel, grid, args).with_config(config)


def tiny_spec(
    config: Config = SMALL,
    inner: int = 512,
    expects: str = "mma",
    dtype: torch.dtype = torch.float16,
    replaces: Config | None = None,
) -> TritonSpec:
    """A kernel of one form and one configuration. replaces: the tiles that are really used."""

    def plan(inner: int, *, config: Config | None = None, arch: str = "sm_80") -> Plan:
        launch = tiny_launch(dtype, replaces or config or SMALL, inner=inner)
        return Plan((launch.args["OUT"],), (launch,))

    return TritonSpec(
        name="tiny_matmul",
        schema="planish_tests::tiny_matmul(Tensor a, Tensor b) -> Tensor",
        serves="tests",
        twin=lambda **_: torch.empty(0),
        plan=plan,
        configs=(config,),
        why_not=lambda arch, inner: "it is too short" if inner < 16 else None,
        cost=lambda inner: Cost(2 * inner * (256 + 512) + 4 * 256 * 512, 2 * 256 * 512 * inner),
        cases=(),
        forms=(Form("one", lambda: {"inner": inner}, expects),),
    )
