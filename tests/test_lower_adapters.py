"""Adapters that are kept apart, on a GPU: which calls they become, and what is left to torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import build
import planish.ir.adapter_op
import pytest
import torch
from planish.codegen.kernel_call import KernelCall
from planish.codegen.lower_gpu import lower_for_gpu
from planish.codegen.lower_triton import lower_for_triton
from planish.codegen.target import export_program
from planish.ir.interpret import run
from planish.ir.pattern import op
from planish.ir.program import Program
from planish.ir.text import program_text
from planish.kernels import adapt
from torch._subclasses.fake_tensor import FakeTensorMode

assert planish.ir.adapter_op
IN, OUT, COUNT = 20, 28, 3


def numbers(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(len(sizes)))


def program(rank: int = 2, length: int = 5, *, free: bool = True) -> Program:
    """Two products of one input with adapters, and one of fewer rows."""

    def body(x: Any, chosen: Any, a: Any, b: Any, scale: Any, w: Any) -> Any:
        last = op.select(x, 1, 0)
        return [op.adapters(op.linear(v, w), v, a, b, scale, chosen) for v in (x, x, last)]

    weights = {
        "a": numbers(COUNT, rank, IN),
        "b": numbers(COUNT, OUT, rank),
        "scale": numbers(COUNT),
        "w": numbers(OUT, IN),
    }
    chosen = torch.tensor([2, -1, 0], dtype=torch.int32)
    return build.program(body, {"x": numbers(3, length, IN), "chosen": chosen}, weights, free=free)


def calls(lowered: Program) -> list[KernelCall]:
    return [n.target for n in lowered.graph.nodes if isinstance(n.target, KernelCall)]


def test_golden_text() -> None:
    """The adapter of each row and their order are made once for all products of as many rows."""
    text = program_text(lower_for_triton(program()).program)
    wanted = (
        "%x : f32[n0, 5, 20]\n"
        "%chosen : i32[n0]\n"
        "%select = select(%x, 1, 0) : f32[n0, 20]\n"
        "%linear_dense = linear_dense(x=%x, bias=None, weight=%w) : f32[n0, 5, 28]\n"
        "%sym_size = sym_size(%chosen, 0) : int n0\n"
        "%unsqueeze = unsqueeze(%chosen, 1) : i32[n0, 1]\n"
        "%expand = expand(%unsqueeze, [%sym_size, 5]) : i32[n0, 5]\n"
        "%reshape = reshape(%expand, [-1]) : i32[5*n0]\n"
        "%argsort = argsort.stable(%reshape, stable=True) : i64[5*n0]\n"
        "%region = region(%argsort) : i32[5*n0]\n"
        "%lora = lora(y=%linear_dense, x=%x, a=%a, "
        "b=%b, scale=%scale, adapters=%reshape, order=%region) : f32[n0, 5, 28]\n"
        "%linear_dense_1 = linear_dense(x=%x, bias=None, weight=%w) : f32[n0, 5, 28]\n"
        "%lora_1 = lora(y=%linear_dense_1, x=%x, a=%a, "
        "b=%b, scale=%scale, adapters=%reshape, order=%region) : f32[n0, 5, 28]\n"
    )
    assert text.startswith(wanted) and text.count("argsort.stable") == 2


def test_it_computes_the_same_and_who_runs_it_is_told() -> None:
    made = program()
    lowering = lower_for_triton(made)
    used = [call.planner for call in calls(lowering.program) if call.spec.name == "lora"]
    assert used == [adapt.__name__] * 3
    flat = list(made.examples)
    exact = run(made, flat, float64=True)
    for got, own, wide in zip(run(lowering.program, flat), run(made, flat), exact, strict=True):
        allowed = 4 * (own - wide).abs().max() + 2**-22 * wide.abs().max()
        assert (got - wide).abs().max() <= allowed


def test_what_the_kernel_does_not_take_stays_and_says_why() -> None:
    lowering = lower_for_triton(program(rank=129))
    assert not [call for call in calls(lowering.program) if call.spec.name == "lora"]
    told = [s for s in lowering.sentences if "in torch because its rank 129 is greater" in s]
    assert len(told) == 3
    assert not [n for n in lowering.program.graph.nodes if "argsort" in str(n.target)]


@pytest.mark.parametrize(("length", "sorted_rows"), [(4, 0), (5, 2)])
def test_a_compiler_is_given_operators(length: int, sorted_rows: int) -> None:
    """Of a batch of 4 captured, 16 rows go one by one and 20 in tiles."""
    made = program(length=length)
    with FakeTensorMode():  # only its device is looked at; the numbers stay on the CPU
        node = next(n for n in made.graph.nodes if "linear" in n.name)
        node.meta["val"] = torch.empty(node.meta["val"].shape, device="cuda")
    lowered, _ = lower_for_gpu(made, "sm_90")
    nodes = [n for n in lowered.graph.nodes if n.target == torch.ops.planish.lora.default]
    assert len(nodes) == 3
    assert sum(n.args[6] is not None for n in nodes) == sorted_rows
    flat = list(made.examples)
    for got, own in zip(
        run(lowered, flat, float64=True), run(made, flat, float64=True), strict=True
    ):
        torch.testing.assert_close(got, own, rtol=1e-12, atol=1e-12)


def test_a_package_brings_both_forms_of_the_kernel(tmp_path: Path) -> None:
    options = {"arch": "sm_80", "lengths": "3"}
    folder = export_program(program(), tmp_path / "package", "triton", options=options)
    told = json.loads((folder / "planish.json").read_text())["triton"]
    assert (folder / "kernels" / "adapt.py").is_file() and (
        folder / "kernels" / "lora.py"
    ).is_file()
    assert "lora_row_shrink_kernel" in json.dumps(told)
