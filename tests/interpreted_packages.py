"""Generated packages in the interpreter; test_triton_package.py runs this in a process of its own.

Not collected by itself: TRITON_INTERPRET=1 must be set before kernels are imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import random_programs
import torch
import two_adapters
import zoo
from coded_model import IDS, coded, in_format
from hypothesis import given, settings
from planish import optimize
from planish.codegen import package_runner
from planish.codegen.kernel_call import KernelCall
from planish.codegen.lower_triton import lower_for_triton
from planish.codegen.triton import WEIGHTS, write_sources, write_weights
from planish.codegen.triton_model import model_source
from planish.ir.formats import parse_format
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.kernels import attend
from planish.kernels.interpreter import repair
from planish.passes.pipeline import Pipeline
from planish.passes.quantize_activations import QuantizeActivations
from planish.passes.quantize_weights import QuantizeWeights
from torch import Tensor

CPU = torch.device("cpu")
EAGER = {"gemma2", "gpt_oss", "bloom"}
WHOLE = ("llama", "gemma2", "bert", "gpt2", "t5", "deepseek_v3")


def interpreted(
    program: Program, inputs: list[Any], folder: Path, launched: list[str] | None = None
) -> list[Tensor]:
    """The generated package's results, every address checked; names of launches are appended."""
    lowering = lower_for_triton(program)
    modules = write_sources(model_source(lowering.program), folder)
    write_weights(lowering.program, folder / WEIGHTS)
    forward = package_runner._import(folder, modules).forward
    weights = package_runner.read_weights(folder / WEIGHTS, CPU)

    def made(plan: Any) -> Any:
        if launched is not None:
            launched.extend(launch.name for launch in plan.launches)
        return plan.run()

    with repair(), torch.no_grad():
        return forward(made, weights, CPU, "sm_80", *inputs)


def assert_as_good(program: Program, inputs: list[Any], got: list[Tensor]) -> None:
    """At most four times the program's own float32 error against float64, and one rounding."""
    exact, plain = run(program, inputs, float64=True), run(program, inputs)
    assert len(got) == len(exact)
    for found, own, reference in zip(got, plain, exact, strict=True):
        assert found.dtype == own.dtype and found.shape == own.shape
        scale = reference.double().abs().max().item() if reference.numel() else 0.0
        allowed = 4 * (own.double() - reference.double()).abs().max().item() + 2**-22 * scale
        assert (found.double() - reference.double()).abs().max().item() <= allowed


@settings(max_examples=30, deadline=None)
@given(made=random_programs.steps())
def test_random_programs(made: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    program = random_programs.program(made)
    inputs = random_programs.inputs()
    got = interpreted(program, inputs, tmp_path_factory.mktemp("package"))
    assert_as_good(program, inputs, got)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_models(name: str, tmp_path: Path) -> None:
    """The package equals the program, at another shape than the captured one."""
    sample = zoo.build(name, attention="eager" if name in EAGER else "sdpa")
    program = optimize(sample.model, sample.args, sample.kwargs, recipe="exact").program
    inputs = program.flatten_inputs((), sample.other_inputs(batch=2, length=11))
    assert_as_good(program, inputs, interpreted(program, inputs, tmp_path))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_cut_models(name: str, tmp_path: Path) -> None:
    """A program that lost a third of its FFN channels and half of its heads."""
    sample = zoo.build(name)
    options = {"cut.ffn": 0.34, "cut.heads": 0.5}
    made = optimize(sample.model, sample.args, sample.kwargs, recipe="cut", options=options)
    inputs = made.program.flatten_inputs((), sample.other_inputs(batch=2, length=11))
    assert_as_good(made.program, inputs, interpreted(made.program, inputs, tmp_path))


@pytest.mark.parametrize("recipe", ["int4", "int8"])
def test_packed_weights(recipe: str, tmp_path: Path) -> None:
    """Quantized models, one of a weight that is [in, out]; the packed parts are what is stored."""
    for name in ("llama", "gpt2"):
        sample = zoo.build(name)
        program = optimize(
            sample.model,
            sample.args,
            sample.kwargs,
            recipe=recipe,
            options={"quantize_weights.remainder": "short"},
        ).program
        inputs = program.flatten_inputs((), sample.other_inputs(batch=1, length=7))
        folder = tmp_path / name
        folder.mkdir()
        assert_as_good(program, inputs, interpreted(program, inputs, folder))
        weights = package_runner.read_weights(folder / WEIGHTS, CPU)
        assert any(weight.endswith(".words") for weight in weights)
        tables = {str(node.target) for node in program.weight_nodes()} & weights.keys()
        assert all(weights[table].dim() == 1 or "wpe" in table for table in tables)


CODED = {
    "nf4": "linear_codebook",
    "fp4-g32-plain": "linear_codebook",
    "kmeans3-tensor": "linear_codebook",
    "kmeans4-g32-f16": "linear_codebook",
    "fp8-e4m3-channel": "linear_codebook",
    "fp8-e5m2-g32-f16": "linear_codebook",
    "mxfp4": "linear_codebook",
    "mxfp6-e3m2": "linear_codebook",
    "nvfp4": "linear_codebook",
    "ternary-tensor": "linear_ternary",
    "ternary-g32": "linear_int",
    "binary-channel": "linear_int",
    "2:4": "linear_sparse24",
}


ROUNDED: dict[str, tuple[dict[str, Any], int]] = {
    "by token": ({}, 3),
    "by token, with zero points": ({"symmetric": False}, 3),
    "static": ({"scheme": "static_tensor"}, 3),
    "static, with zero points": ({"scheme": "static_tensor", "symmetric": False}, 3),
    "by tensor": ({"scheme": "dynamic_tensor"}, 0),
    "outlier columns": ({"scheme": "llm_int8", "threshold": 2.0}, 0),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_activations(name: str, tmp_path: Path) -> None:
    """linear_w8a8 rounds what it reads; what no kernel rounds is torch's and told."""
    options, kernels = ROUNDED[name]
    steps = [QuantizeWeights(), QuantizeActivations(**options)]
    program = Pipeline(steps).run(coded(96), calibration=[[IDS]])
    lowering = lower_for_triton(program)
    used = [node.target.spec.name for node in lowering.program.graph.nodes
            if isinstance(node.target, KernelCall)]  # fmt: skip
    assert used.count("linear_w8a8") == kernels
    assert len([s for s in lowering.sentences if "torch's product because" in s]) == 3 - kernels
    assert_as_good(program, [IDS], interpreted(program, [IDS], tmp_path))


@pytest.mark.parametrize("name", CODED)
def test_coded_weights(name: str, tmp_path: Path) -> None:
    """Each format's codes go to the kernel that reads them, beside float32 activations."""
    program = in_format(coded(96), parse_format(name), parse_format("int8-channel-sym"))
    kernels = [node.target.spec.name for node in lower_for_triton(program).program.graph.nodes
               if isinstance(node.target, KernelCall)]  # fmt: skip
    assert kernels.count(CODED[name]) == 3
    assert_as_good(program, [IDS], interpreted(program, [IDS], tmp_path))


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nvfp4", "nf4"])
def test_coded_weights_beside_half_precision(name: str, tmp_path: Path) -> None:
    program = in_format(coded(96, torch.bfloat16), parse_format(name))
    kernels = [node.target.spec.name for node in lower_for_triton(program).program.graph.nodes
               if isinstance(node.target, KernelCall)]  # fmt: skip
    assert kernels.count("linear_codebook" if name == "nf4" else "linear_mx") == 3
    (got,) = interpreted(program, [IDS], tmp_path)
    (exact,), (own,) = run(program, [IDS], float64=True), run(program, [IDS])
    assert (got.double() - exact).abs().max() <= 2 * (own.double() - exact).abs().max()


def test_what_no_kernel_reads_is_told() -> None:
    for name, reason in (("gobo3", "gobo3 is not an affine integer format"),
                         ("int4-g32-offset", "no kernel adds what int4-g32-offset has"),
                         ("nf4-g24", "its groups of 24 are no multiple of 16")):  # fmt: skip
        program = in_format(coded(96), parse_format(name), parse_format("int8-channel-sym"))
        told = [s for s in lower_for_triton(program).sentences if reason in s]
        assert len(told) == 3, told


def test_half_precision(tmp_path: Path) -> None:
    """Between its kernels' results a package computes in float32: no worse than the program."""
    sample = zoo.build("llama")
    model = sample.model.to(torch.bfloat16)
    program = optimize(model, sample.args, sample.kwargs, recipe="exact").program
    inputs = program.flatten_inputs((), sample.other_inputs(batch=2, length=11))
    (got,) = interpreted(program, inputs, tmp_path)
    (exact,), (own,) = run(program, inputs, float64=True), run(program, inputs)
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).abs().max() <= 2 * (own.double() - exact).abs().max()


def test_a_decoder_with_its_cache(tmp_path: Path) -> None:
    """Prefill from an empty cache, then a token on what came out of it."""
    sample = zoo.build("llama")
    ids = sample.other_inputs(batch=2, length=9)["input_ids"]
    program = optimize(sample.model, (ids,), recipe="exact", kv_cache=True).program
    empty = [past[:, :, :0] for past in program.examples[1:]]
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    prefill = [ids[:, :8], *empty]
    got = interpreted(program, prefill, first)
    assert_as_good(program, prefill, got)
    decode = [ids[:, 8:], *got[1:]]
    assert_as_good(program, decode, interpreted(program, decode, second))


@pytest.mark.parametrize("length", [3, 9])
@pytest.mark.parametrize("packed", [False, True])
def test_adapters_kept_apart(packed: bool, length: int, tmp_path: Path) -> None:
    """Few rows: a program each; many: tiles of rows sorted by adapter. The base may be packed."""
    two_adapters.saved("llama", tmp_path)
    program = two_adapters.base("llama")
    if packed:
        step = QuantizeWeights(bits=4, remainder="short", skip="lm_head*")
        program = Pipeline([step]).run(program)
    program = two_adapters.served(program, tmp_path)
    ids = zoo.build("llama").other_inputs(batch=4, length=length)
    inputs = [*ids.values(), torch.tensor([1, -1, 0, 1], dtype=torch.int32)]
    package, launched = tmp_path / "package", list[str]()
    package.mkdir()
    got = interpreted(program, inputs, package, launched)
    form = "lora_row_shrink_kernel" if length == 3 else "lora_shrink_kernel"
    assert launched.count(form) == 4 and sum("lora" in name for name in launched) == 2 * 4
    assert_as_good(program, inputs, got)


@pytest.mark.parametrize("length", [7, 30])
@pytest.mark.parametrize("recipe", ["exact", "int4"])
def test_a_prologue_for_few_rows_and_for_many(recipe: str, length: int, tmp_path: Path) -> None:
    """Few rows: the gate is computed as x is loaded; many: by a launch before the product."""
    sample = zoo.build("llama")
    options = {} if recipe == "exact" else {"quantize_weights.remainder": "short"}
    ids = sample.other_inputs(batch=1, length=length)["input_ids"]
    program = optimize(sample.model, (ids,), recipe=recipe, options=options).program
    lowering = lower_for_triton(program)
    targets = [node.target for node in lowering.program.graph.nodes]
    assert sum(isinstance(t, KernelCall) and t.prologue is not None for t in targets) == 2
    launched: list[str] = []
    got = interpreted(program, [ids], tmp_path, launched)
    assert any("gated" in name for name in launched) == (length > 16)
    assert_as_good(program, [ids], got)


@pytest.mark.parametrize(("queries", "keys"), [(1, 600), (3, 515), (16, 512), (17, 600), (2, 40)])
def test_attention_by_either_kernel(queries: int, keys: int) -> None:
    """A window, a soft cap and sinks mean the same to both; the sizes decide which one runs."""
    generator = torch.Generator().manual_seed(queries)
    q = torch.randn(2, 6, queries, 32, generator=generator)
    k, v = (torch.randn(2, 2, keys, 32, generator=generator) for _ in "kv")
    sinks = torch.randn(6, generator=generator)
    form: dict[str, Any] = {"scale": 0.2, "causal": True, "window": 300, "softcap": 9.0}
    made = attend.plan(q, k, v, None, sinks, **form)
    split = queries <= attend.FEW and keys >= attend.MANY
    assert any("decode" in launch.name for launch in made.launches) == split
    with repair():
        made.run()
    wide = [x.double() for x in (q, k, v)]
    exact = torch.ops.planish.attention(*wide, None, sinks.double(), **form)
    own = torch.ops.planish.attention(q, k, v, None, sinks, **form)
    allowed = 4 * (own.double() - exact).abs().max() + 2**-22
    assert (made.outputs[0].double() - exact).abs().max() <= allowed


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["exact", "int4"])
def test_a_real_language_model(recipe: str, smollm2_folder: Path, tmp_path: Path) -> None:
    """All layers of a 135M-parameter model, dense and packed; minutes in the interpreter."""
    program = optimize(smollm2_folder, recipe=recipe).program
    ids = torch.randint(0, 49000, (1, 5), generator=torch.Generator().manual_seed(1))
    named = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    given = {node.name: named[node.name] for node in program.inputs}
    inputs = program.flatten_inputs((), given)
    assert_as_good(program, inputs, interpreted(program, inputs, tmp_path))
