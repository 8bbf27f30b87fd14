"""Small PTX programs for tests of the simulator: one thread a value, operands in registers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from planish.kernels.ptx_execute import Execution, execute
from torch import Tensor

HEADER = ".version 8.8\n.target sm_90\n.address_size 64\n"
REGISTERS = """
.reg .pred %p<32>; .reg .b16 %rs<64>; .reg .b32 %r<128>; .reg .b64 %rd<64>;
"""


def module(body: str, pointers: int, static: str = "") -> str:
    """An entry function whose parameters are pointers, in %rd50, %rd51, ...; %r100 is the thread.

    %rd40 is the thread's number in 64 bits.
    """
    names = ", ".join(f".param .u64 .ptr .global .align 1 k_param_{i}" for i in range(pointers))
    loads = "".join(f"ld.param.b64 %rd{50 + i}, [k_param_{i}];\n" for i in range(pointers))
    return (
        f"{HEADER}.extern .shared .align 16 .b8 global_smem[];\n{static}\n"
        f".visible .entry k({names}) {{\n{REGISTERS}{loads}"
        "mov.u32 %r100, %tid.x;\ncvt.u64.u32 %rd40, %r100;\n"
        f"{body}\nret;\n}}\n"
    )


def run(
    body: str,
    tensors: Sequence[Tensor],
    threads: int = 32,
    shared: int = 4096,
    grid: Sequence[int] = (1,),
    static: str = "",
    **options: bool | int,
) -> Execution:
    """Execute a body on the tensors, whose addresses are in %rd50 and on."""
    ptx = module(body, len(tensors), static)
    return execute(ptx, grid, list(tensors), threads=threads, shared=shared, **options)  # type: ignore[arg-type]


def each(operation: str, inputs: Sequence[Tensor], out: torch.dtype, threads: int = 32) -> Tensor:
    """The operation on every thread's value of the inputs [threads]; $0 is the result, $1 ... they.

    A register's class follows from the dtype: .b16 for one and two bytes, .b32, .b64.
    """
    classes = {1: "rs", 2: "rs", 4: "r", 8: "rd"}
    result = torch.zeros(threads, dtype=out)
    body, names = "", []
    for number, tensor in enumerate([*inputs, result]):
        size = tensor.element_size()
        names.append(f"%{classes[size]}{number + 1}")
        body += f"mad.lo.s64 %rd{30 + number}, %rd40, {size}, %rd{50 + number};\n"
    for number, (tensor, name) in enumerate(zip(inputs, names, strict=False)):
        body += f"ld.global.b{8 * tensor.element_size()} {name}, [%rd{30 + number}];\n"
    for number in reversed(range(len(inputs))):
        operation = operation.replace(f"${number + 1}", names[number])
    body += operation.replace("$0", names[-1]) + "\n"
    body += f"st.global.b{8 * result.element_size()} [%rd{30 + len(inputs)}], {names[-1]};"
    run(body, [*inputs, result], threads)
    return result
