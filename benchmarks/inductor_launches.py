"""Count launches and bytes of our Triton target beside those of Inductor's code for the same graph.

    python benchmarks/inductor_launches.py [--rows 4096] [--width 4096] [--wide 8192] [--code]

No GPU is needed and nothing is run: Inductor writes its CUDA code for fake tensors, and what it
asks of a GPU is answered as by an H100. That leans on some twenty private names of torch 2.13, so
this is a tool, not a test. The graph goes straight to Inductor's lowering, without its passes over
graphs and without autotuned matmuls. It is: RMS norm, matmul, SiLU, softmax, in float16.

Bytes: every tensor that a launch reads or writes, once. Both sides may move more than that.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from planish import trace
from planish.codegen import package_runner
from planish.codegen.lower_triton import lower_for_triton
from planish.codegen.triton import write_sources
from planish.codegen.triton_binaries import meta_inputs, recorded, size_choices
from planish.codegen.triton_model import model_source
from torch import Tensor, nn
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _triton

H100 = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    L2_cache_size=50 << 20,
    gcnArchName="",
)


@dataclass(frozen=True)
class Count:
    """launches: by name, in order; nbytes: of every launch's tensors."""

    launches: list[str]
    nbytes: int

    def show(self, name: str) -> None:
        print(f"{name}: {len(self.launches)} launches, {self.nbytes / 1e6:,.1f} MB")
        for launch in self.launches:
            print(f"    {launch}")


def function(x: Tensor, gain: Tensor, weight: Tensor) -> Tensor:
    """x [rows, width]; gain [width]; weight [wide, width]."""
    scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    y = nn.functional.linear(x * scale.to(x.dtype) * gain, weight)
    return torch.softmax(nn.functional.silu(y), -1)


class Module(nn.Module):
    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width, dtype=torch.float16))
        self.weight = nn.Parameter(torch.zeros(wide, width, dtype=torch.float16))

    def forward(self, x: Tensor) -> Tensor:
        return function(x, self.gain, self.weight)


def ours(rows: int, width: int, wide: int) -> Count:
    """What a package of the target triton launches for `rows` rows on sm_90."""
    program = trace(Module(width, wide).eval(), (torch.zeros(rows, width, dtype=torch.float16),))
    lowered = lower_for_triton(program, ("sm_90",)).program
    with tempfile.TemporaryDirectory() as folder:
        modules = write_sources(model_source(lowered), Path(folder))
        forward = package_runner._import(Path(folder), modules).forward
        weights = {
            str(node.target): torch.empty_like(node.meta["val"], device="meta")
            for node in lowered.weight_nodes()
        }
        sizes = (size_choices(lowered, [rows]) or [{}])[0]
        launches = recorded(forward, weights, "sm_90", meta_inputs(lowered, sizes))
    tensors = [t for launch in launches for t in launch.args.values() if isinstance(t, Tensor)]
    return Count([launch.name for launch in launches], sum(t.nbytes for t in tensors))


def inductors(rows: int, width: int, wide: int, show_code: bool) -> Count:
    """What Inductor's generated code launches; its own count of bytes."""
    mode = FakeTensorMode()
    with mode, torch.no_grad():
        shapes = ((rows, width), (width,), (wide, width))
        fakes = [torch.empty(shape, dtype=torch.float16, device="cuda") for shape in shapes]
        tabled = make_fx(lambda *a: (function(*a),), decomposition_table=select_decomp_table())
        graph = tabled(*fakes)
    graph.graph.eliminate_dead_code()
    with pretended_gpu():
        lowering = GraphLowering(
            graph, example_inputs=fakes, shape_env=ShapeEnv(), is_inference=True
        )
        with (
            V.set_fake_mode(mode),
            V.set_graph_handler(lowering),
            V.set_debug_handler(DebugContext()),
            V.set_extern_kernel_nodes([]),
        ):
            lowering.run(*fakes)
            code = lowering.codegen()[0].value
            nbytes = lowering.count_bytes()[0]
    if show_code:
        print(code)
    launches = re.findall(r"^\s+(triton_\w+(?=\.run\()|extern_kernels\.\w+(?=\())", code, re.M)
    return Count(launches, int(nbytes))


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Whatever is asked of a GPU is answered as by an H100; nothing can be run on it."""
    properties = {"get_device_properties": lambda *a, **k: H100, "current_device": lambda *a: 0}
    present = {"is_available": lambda: True, "device_count": lambda: 1, **properties}
    still = {"synchronize": lambda *a: None}
    cuda = {
        "get_device_capability": lambda *a, **k: (9, 0),
        "_lazy_init": lambda: None,
        "is_initialized": lambda: True,
        "current_stream": lambda *a: None,
    }
    interface = {
        "get_compute_capability": lambda *a, **k: 90,
        "is_triton_capable": lambda *a: True,
        "raise_if_triton_unavailable": lambda *a: None,
        "maybe_exchange_device": lambda device: 0,
        "exchange_device": lambda device: 0,
        "get_raw_stream": lambda device: 0,
    }
    with contextlib.ExitStack() as stack:

        def put(owner: Any, answers: dict[str, Any], as_is: Any) -> None:
            for name, answer in answers.items():
                stack.enter_context(mock.patch.object(owner, name, as_is(answer)))

        put(torch.cuda, {**present, **still, **cuda}, lambda answer: answer)
        put(CudaInterface, {**present, **still, **interface}, staticmethod)
        put(CudaInterface.Worker, properties, staticmethod)
        put(_triton, {"triton_hash_with_backend": lambda: "none"}, lambda answer: answer)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, size in (("rows", 4096), ("width", 4096), ("wide", 8192)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--code", action="store_true", help="print Inductor's code")
    asked = parser.parse_args()
    ours(asked.rows, asked.width, asked.wide).show("planish")
    inductors(asked.rows, asked.width, asked.wide, asked.code).show("Inductor")
    print("counted, not measured: neither was run")


if __name__ == "__main__":
    main()
