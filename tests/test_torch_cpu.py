"""The torch target: lowered programs against float64 runs, choices, attention, folders."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from captured import captured, sample
from planish.codegen import torch_cpu
from planish.codegen.lower_cpu import lower_for_cpu
from planish.codegen.target import export_program
from planish.codegen.torch_cpu import compile_program, load, lower
from planish.ir import interpret
from planish.ir.capture import capture_module
from planish.ir.errors import WrongOption
from planish.ir.program import Program
from planish.kernels import native
from planish.kernels.linear_affine import SOURCE
from planish.passes.pipeline import Pipeline
from planish.passes.quantize_weights import QuantizeWeights
from torch import Tensor, nn

TABLES = "int8-g32-sym-f32"

pytestmark = pytest.mark.skipif(
    isinstance(native.library(SOURCE), str), reason="no C compiler on this machine"
)


def quantized(program: Program, **options: Any) -> Program:
    options = {"remainder": "short", "embeddings": TABLES, **options}
    return Pipeline([QuantizeWeights(**options)], verify="structure").run(program)


def assert_as_good(program: Program, run: Any, flat: list[Any]) -> None:
    """No further from the float64 run than the reference run is, four roundings of the output
    granted: two float32 orders of the same sums differ by about one another's error."""
    truth = interpret.run(program, flat, float64=True)
    reference = interpret.run(program, flat)
    for true, plain, got in zip(truth, reference, run(*flat), strict=True):
        assert (got.shape, got.dtype) == (plain.shape, plain.dtype)
        if not got.is_floating_point():
            assert torch.equal(got, plain)
            continue
        allowed = (plain - true).abs().max() + torch.finfo(plain.dtype).eps * true.abs().max()
        assert (got - true).abs().max() <= 4 * allowed


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "t5"])
@pytest.mark.parametrize(
    "options", [{"bits": 4, "group_size": 32}, {"bits": 8}, {"bits": 3, "group_size": 7}]
)
def test_lowered_models_are_as_near_to_float64_as_the_reference(
    name: str, options: dict[str, Any]
) -> None:
    program = quantized(captured(name), symmetric=len(options) == 1, **options)
    module = lower(program)
    packed = [s for s in module.meta["choices"] if "runs packed" in s]
    assert packed and not any("stays dense" in s for s in module.meta["choices"])
    made: zoo.Sample = sample(name, "sdpa")
    run = compile_program(program, "eager")
    for batch, length in ((1, 1), (1, 3), (2, 13)):
        assert_as_good(program, run, program.flatten_inputs((), made.other_inputs(batch, length)))


class Odd(nn.Module):
    """Weights that a kernel serves, and some that it does not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(21, 12)
        self.served = nn.Linear(12, 10)
        self.stack = nn.Parameter(torch.randn(3, 10, 7))
        self.bias = nn.Parameter(torch.randn(4, 6))
        self.right = nn.Parameter(torch.randn(7, 6))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.served(self.table(ids))
        y = torch.matmul(x.unsqueeze(0), self.stack.unsqueeze(1)).sum(0)
        z = torch.addmm(self.bias, y[0, :4], self.right)
        return z, self.served(self.table(ids)) @ self.served.weight @ self.table.weight.t()


def odd() -> Program:
    return capture_module(Odd(), (torch.arange(10).reshape(2, 5),))


def test_every_encoded_weight_has_a_sentence() -> None:
    from planish.ir.formats import AffineInt

    program = odd()
    fmt = AffineInt(4, 4)
    for name, axis in (("served.weight", -1), ("stack", -2), ("right", -2), ("table.weight", -1)):
        program.weights[name] = fmt.encode(program.weights[name], axis)
    sentences = lower(program).meta["choices"]
    told = {s.split()[0]: s.partition(") ")[2] for s in sentences}
    assert told["%table.weight"] == "runs packed: linear_affine, rows_affine"
    assert told["%served.weight"] == (
        "stays dense because its groups do not lie along the axis that its readers sum over"
    )
    assert (
        told["%stack"].startswith("stays dense because %") and "neither a matmul" in told["%stack"]
    )
    assert told["%right"].startswith("stays dense because %addmm adds more than a bias")
    flat = list(program.examples)
    assert_as_good(program, compile_program(program, "eager"), flat)


def test_a_table_and_its_tied_head_share_one_copy() -> None:
    program = quantized(captured("gemma"), bits=4, group_size=16)
    lowered, _ = lower_for_cpu(program)
    table = next(n for n in lowered.weights if n.endswith("embed_tokens.weight.packed_codes"))
    (node,) = [n for n in lowered.weight_nodes() if n.target == table]
    readers = {str(user.target) for user in node.users}
    assert readers == {"planish.rows_affine.default", "planish.linear_affine.default"}
    assert not any("embed_tokens.weight" in n and "packed" not in n for n in lowered.weights)


def test_lowering_leaves_the_program_alone() -> None:
    program = quantized(captured("llama"), bits=4)
    before = str(program), sorted(program.weights), program.nbytes()
    lower(program)
    assert (str(program), sorted(program.weights), program.nbytes()) == before


def test_half_precision_models_stay_in_their_dtype() -> None:
    model = zoo.build("llama", "sdpa")
    half = model.model.to(torch.bfloat16)
    program = quantized(capture_module(half, model.args, model.kwargs), bits=8)
    flat = list(program.examples)
    assert_as_good(program, compile_program(program, "eager"), flat)


@pytest.mark.parametrize("kv_heads", [2, 6])
@pytest.mark.parametrize("window", [0, 4, 40])
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (1, 9), (3, 9), (1, 1)])
@pytest.mark.parametrize("masked", [None, "bool", "float"])
def test_attention_in_every_case(
    kv_heads: int, window: int, queries: int, keys: int, masked: str | None
) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, queries, 10), torch.randn(2, kv_heads, keys, 10)
    v = torch.randn(2, kv_heads, keys, 14)
    mask = None if masked is None else torch.rand(2, 1, queries, keys) > 0.3
    if mask is not None:
        rows = torch.arange(queries)
        mask[..., rows, rows + keys - queries] = True  # every query sees its own key
        mask = mask if masked == "bool" else torch.where(mask, 0.0, -3.0)
    got = torch.ops.planish.attention_cpu(q, k, v, mask, 0.3, True, window, False)
    wide = None if mask is None else mask.double() if masked == "float" else mask
    truth = torch.ops.planish.attention(
        q.double(), k.double(), v.double(), wide, scale=0.3, causal=True, window=window
    )
    plain = torch.ops.planish.attention(q, k, v, mask, scale=0.3, causal=True, window=window)
    allowed = (plain - truth).nan_to_num().abs().max() + torch.finfo(torch.float32).eps * 4
    assert (got - truth).nan_to_num().abs().max() <= 4 * allowed


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_blind_queries_as_the_operation_says(uniform: bool, causal: bool) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, 5, 10), torch.randn(2, 3, 5, 10)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[1, ..., :2] = False  # left padding: with a causal mask, two queries see nothing
    if not causal:
        mask[1] = False
    form = {"scale": 0.3, "causal": causal, "uniform_if_blind": uniform}
    wanted = torch.ops.planish.attention(q, k, k, mask, **form)
    got = torch.ops.planish.attention_cpu(q, k, k, mask, 0.3, causal, 0, uniform)
    assert bool(wanted[1, :, 0].any()) == uniform, "the case is what it is meant to be"
    torch.testing.assert_close(got, wanted)


def test_one_query_and_square_causal_attention_build_no_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from planish.ir import ops

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("a mask was built")

    monkeypatch.setattr(ops, "_visible", refuse)
    for queries, keys in ((1, 9), (9, 9)):
        q, k = torch.randn(1, 4, queries, 8), torch.randn(1, 2, keys, 8)
        torch.ops.planish.attention_cpu(q, k, k, None, 1.0, True, 0, False)
    with pytest.raises(AssertionError, match="a mask was built"):
        torch.ops.planish.attention_cpu(q[:, :, :3], k, k, None, 1.0, True, 0, False)


def test_folder_round_trip(tmp_path: Path) -> None:
    program = quantized(captured("llama"), bits=4, group_size=32)
    folder = export_program(program, tmp_path / "out", "torch")
    loaded = load(folder, compiler="eager")
    flat = list(program.examples)
    wanted = compile_program(program, "eager")(*flat)
    got = loaded._run(*flat)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert not [f for f in folder.rglob("*") if f.suffix in (".pt", ".bin", ".pkl")]
    made = sample("llama", "sdpa")
    assert loaded(**made.kwargs) is not None


def test_wrong_compiler() -> None:
    with pytest.raises(WrongOption, match="no compiler 'gcc'"):
        compile_program(odd(), "gcc")


def test_without_a_cpp_compiler_it_runs_eagerly_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch_cpu, "_cpp_compiler_works", lambda: False)
    program = odd()
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler") as caught:
        run = compile_program(program)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_as_good(program, run, list(program.examples))


def test_inductor_compiles_once_for_all_shapes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._dynamo.backends import common

    made, compiled = zoo.build("llama", "sdpa", layers=1), []
    program = quantized(capture_module(made.model, made.args, made.kwargs), bits=4)
    inner = common.aot_module_simplified

    def counted(*args: Any, **kwargs: Any) -> Any:
        compiled.append(args)
        return inner(*args, **kwargs)

    monkeypatch.setattr(common, "aot_module_simplified", counted)
    run = compile_program(program)
    # It would say that a size got fixed and the graph runs uncompiled.
    assert not [r for r in caplog.records if r.name.startswith("planish")]
    for batch, length in ((2, 19), (1, 1), (1, 8), (3, 1), (5, 40)):
        flat = program.flatten_inputs((), made.other_inputs(batch, length))
        assert_as_good(program, run, flat)
    assert len(compiled) == 1
