"""Single operations in ONNX, with free sizes, against PyTorch at another shape."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import planish.ir.ops  # registers the planish namespace
import pytest
import torch
from onnx_checks import assert_equal_to_rounding, exported, graph_of, op_counts
from planish.codegen.onnx import build
from planish.codegen.onnx_builder import Options
from planish.ir.errors import UnsupportedByTarget
from planish.ir.history import History
from planish.ir.program import Program
from planish.ir.weights import Weights
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.utils import _pytree as pytree

aten, own = torch.ops.aten, torch.ops.planish
SEMANTIC = planish.ir.ops.__name__


def program_of(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, free: int = 1
) -> Program:
    """One call as a program: its tensors are inputs, whose first `free` axes are free."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    graph = fx.Graph()
    fakes: dict[fx.Node, Tensor] = {}

    def given(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder(f"input_{len(fakes)}")
        axes = [
            DimDynamic.DUCK if axis < free else DimDynamic.STATIC for axis in range(value.dim())
        ]
        context = StatelessSymbolicContext(dynamic_sizes=axes)
        fakes[node] = mode.from_tensor(value, symbolic_context=context)
        node.meta = {"val": fakes[node], "module": ""}
        return node

    nodes, words = pytree.tree_map(given, (args, kwargs or {}))
    call = graph.call_function(target, nodes, words)
    with mode, torch.no_grad(), enable_python_dispatcher():
        real = pytree.tree_map(lambda value: fakes.get(value, value), (nodes, words))
        value = target(*real[0], **real[1])
    call.meta = {"val": value, "module": "layer"}
    results: list[fx.Node] = [call]
    if isinstance(value, (list, tuple)):
        results = [
            graph.call_function(operator.getitem, (call, place)) for place in range(len(value))
        ]
        for node, part in zip(results, value, strict=True):
            node.meta = {"val": part, "module": "layer"}
    graph.output(results)
    in_spec = pytree.tree_structure((tuple(fakes.values()), {}))
    out_spec = pytree.tree_structure(tuple(results))
    return Program(graph, Weights(), in_spec, out_spec, history=History())


def check(
    tmp_path: Path,
    target: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    free: int = 1,
    grow: Callable[[Tensor], Tensor] | None = None,
) -> Path:
    """Export a call and compare at another shape; returns the folder."""
    program = program_of(target, args, kwargs, free)
    folder = exported(program, tmp_path / "out")
    leaves = pytree.tree_leaves((args, kwargs or {}))
    tensors = [value for value in leaves if isinstance(value, Tensor)]
    flat = [grow(tensor) if grow else tensor for tensor in tensors]
    assert_equal_to_rounding(program, folder, flat)
    return folder


def longer(tensor: Tensor) -> Tensor:
    """One row more."""
    return torch.cat([tensor, tensor[:1]])


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ints(*shape: int, high: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


X, Y, N, M = floats(5, 7), floats(5, 7, seed=2), ints(5, 7) - 4, ints(5, 7, seed=3) + 1
B = ints(5, 7, high=2).bool()
D = floats(5, 7, 3)
CASES: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "add_alpha": (aten.add.Tensor, (X, Y), {"alpha": 3}),
    "sub_ints": (aten.sub.Tensor, (N, 2), {}),
    "add_bool": (aten.add.Tensor, (B, ~B), {}),
    "mixed": (aten.mul.Tensor, (N, X), {}),
    "rsub": (aten.rsub.Scalar, (X, 2.0), {}),
    "div_ints": (aten.div.Tensor, (N, M), {}),
    "div_floor_ints": (aten.div.Tensor_mode, (N, M), {"rounding_mode": "floor"}),
    "div_trunc_ints": (aten.div.Tensor_mode, (N, M), {"rounding_mode": "trunc"}),
    "div_floor": (aten.div.Tensor_mode, (X, Y), {"rounding_mode": "floor"}),
    "floor_divide": (aten.floor_divide.default, (N, M), {}),
    "remainder_ints": (aten.remainder.Tensor, (N, M), {}),
    "remainder": (aten.remainder.Tensor, (X, Y), {}),
    "fmod": (aten.fmod.Tensor, (X, Y), {}),
    "pow_tensor": (aten.pow.Tensor_Tensor, (X.abs(), Y), {}),
    "pow_base": (aten.pow.Scalar, (2.5, X), {}),
    "pow_half": (aten.pow.Tensor_Scalar, (X.abs(), 0.5), {}),
    "rsqrt": (aten.rsqrt.default, (X.abs() + 1,), {}),
    "log1p": (aten.log1p.default, (X.abs(),), {}),
    "sigmoid_of_ints": (aten.sigmoid.default, (N,), {}),
    "eq_bool": (aten.eq.Tensor, (B, ~B), {}),
    "lt_mixed": (aten.lt.Tensor, (N, X), {}),
    "lt_fraction": (aten.lt.Scalar, (N, 0.5), {}),
    "ne": (aten.ne.Scalar, (N, 2), {}),
    "bitwise_not": (aten.bitwise_not.default, (N,), {}),
    "bitwise_and": (aten.bitwise_and.Tensor, (N, M), {}),
    "where_mixed": (aten.where.self, (B, X, N), {}),
    "masked_fill": (aten.masked_fill.Scalar, (X, B, -2), {}),
    "clamp": (aten.clamp.default, (X, -0.5, 0.5), {}),
    "clamp_min": (aten.clamp.default, (N, 0), {}),
    "nan_to_num": (aten.nan_to_num.default, (X / X.relu(), 0.5, 2.0, -3.0), {}),
    "softplus": (aten.softplus.default, (X * 9, 2.0, 5.0), {}),
    "leaky_relu": (aten.leaky_relu.default, (X, 0.2), {}),
    "elu": (aten.elu.default, (X,), {}),
    "gelu_tanh": (aten.gelu.default, (X,), {"approximate": "tanh"}),
    "addcmul": (aten.addcmul.default, (X, Y, Y), {"value": 0.5}),
    "hardswish": (aten.hardswish.default, (X,), {}),
    "unsqueeze_last": (aten.unsqueeze.default, (X, -1), {}),
    "squeeze_none": (aten.squeeze.dim, (X, 1), {}),
    "slice_negative": (aten.slice.Tensor, (X, 1, -3, -1), {}),
    "slice_step": (aten.slice.Tensor, (X, 1, 1, 7, 2), {}),
    "select": (aten.select.int, (D, 1, -2), {}),
    "cat_empty": (aten.cat.default, ([torch.zeros(0), X, Y], 1), {}),
    "stack": (aten.stack.default, ([X, Y], -1), {}),
    "split": (aten.split.Tensor, (X, 3, 1), {}),
    "unbind": (aten.unbind.int, (D, -1), {}),
    "repeat": (aten.repeat.default, (X, [2, 1, 3]), {}),
    "repeat_interleave": (aten.repeat_interleave.self_int, (X, 3, 1), {}),
    "repeat_flat": (aten.repeat_interleave.self_int, (X, 2), {}),
    "flip": (aten.flip.default, (D, [1, 2]), {}),
    "pad": (aten.constant_pad_nd.default, (X, [1, 2, 0, 3], 0.5), {}),
    "cut_by_pad": (aten.constant_pad_nd.default, (X, [-1, -2]), {}),
    "slice_scatter": (aten.slice_scatter.default, (X, Y[:, :3], 1, 2, 5), {}),
    "select_scatter": (aten.select_scatter.default, (X, Y[:, 0], 1, 3), {}),
    "tril": (aten.tril.default, (X, 1), {}),
    "diff": (aten.diff.default, (X,), {}),
    "sum_all": (aten.sum.default, (N,), {}),
    "sum_bool": (aten.sum.dim_IntList, (B, [1]), {}),
    "mean": (aten.mean.dim, (D, [0, -1]), {}),
    "std": (aten.std.correction, (X, [1]), {}),
    "var_mean": (aten.var_mean.correction, (X, [1]), {"correction": 0}),
    "amax": (aten.amax.default, (D, [1], True), {}),
    "any": (aten.any.dim, (B, 1), {}),
    "all": (aten.all.default, (B,), {}),
    "max_dim": (aten.max.dim, (X, 1), {}),
    "argmin_flat": (aten.argmin.default, (X,), {}),
    "cumsum": (aten.cumsum.default, (N, -1), {}),
    "cumsum_bool": (aten.cumsum.default, (B, 1), {}),
    "topk": (aten.topk.default, (X, 3), {}),
    "sort": (aten.sort.default, (X, 1, True), {}),
    "log_softmax": (aten.log_softmax.int, (X, -1), {}),
    "logsumexp": (aten.logsumexp.default, (X, [1]), {}),
    "index_one": (aten.index.Tensor, (X, [None, torch.tensor([3, -1, 0])]), {}),
    "index_inner": (
        aten.index.Tensor,
        (floats(5, 4, 6, 3), [None, torch.tensor([[3], [1]]), torch.tensor([5, 0, 2])]),
        {},
    ),
    "index_apart": (
        aten.index.Tensor,
        (floats(5, 4, 6), [torch.tensor([1, 4]), None, torch.tensor([2, 5])]),
        {},
    ),
    "gather_shorter": (aten.gather.default, (X, 1, ints(3, 2, high=7)), {}),
    "scatter": (aten.scatter.value, (X, 1, ints(5, 2, high=7), 4.0), {}),
    "scatter_add": (aten.scatter_add.default, (X, 1, ints(5, 2, high=7), Y[:, :2]), {}),
    "index_select": (aten.index_select.default, (X, 1, torch.tensor([6, 0])), {}),
    "index_put": (
        aten.index_put.default,
        (X, [torch.tensor([0, 3])], floats(2, 7, seed=9), True),
        {},
    ),
    "addmm": (aten.addmm.default, (floats(3), X, floats(7, 3)), {"alpha": 2, "beta": 0.5}),
    "baddbmm": (aten.baddbmm.default, (floats(5, 1, 4), D, floats(5, 3, 4)), {"beta": 0.5}),
    "linear_of_values": (aten.linear.default, (X, floats(3, 7), floats(3)), {}),
    "conv1d_same": (aten.conv1d.padding, (D.mT, floats(4, 3, 3), None, [1], "same"), {}),
    "conv2d": (
        aten.conv2d.default,
        (floats(5, 4, 9, 8), floats(6, 2, 3, 2), floats(6), [2, 1], [1, 0], [1, 1], 2),
        {},
    ),
    "pool": (aten.adaptive_avg_pool1d.default, (D, [1]), {}),
    "group_norm": (aten.group_norm.default, (floats(5, 6, 4), 3, floats(6), floats(6)), {}),
    "aten_rms_norm": (aten.rms_norm.default, (X, [7], floats(7), 1e-5), {}),
    "layer_norm": (aten.layer_norm.default, (D, [7, 3], None, None), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_operation_equals_pytorch(case: str, tmp_path: Path) -> None:
    target, args, kwargs = CASES[case]
    check(tmp_path, target, args, kwargs)


def test_free_axes_stay_free(tmp_path: Path) -> None:
    check(tmp_path, aten.cat.default, ([X, Y],), grow=longer)
    check(tmp_path, aten.flip.default, (D, [0, 1]), grow=longer)
    check(tmp_path, aten.sort.default, (X, 0), grow=longer)


def test_masked_indexing_gives_as_many_rows_as_the_mask_holds(tmp_path: Path) -> None:
    program = program_of(aten.index.Tensor, (X, [torch.tensor([1, 0, 1, 1, 0]).bool()]), free=1)
    folder = exported(program, tmp_path / "out")
    mask = torch.tensor([0, 0, 1, 0, 0]).bool()
    assert_equal_to_rounding(program, folder, [X, mask])


def heads(count: int, length: int, size: int, seed: int = 0) -> Tensor:
    return floats(2, count, length, size, seed=seed)


def attention_mask(kind: str, queries: int, keys: int, blind: bool = True) -> Tensor | None:
    seen = floats(2, 1, queries, keys, seed=5) > -0.5
    seen[0, 0, 0] = not blind
    if kind == "none":
        return None
    if kind == "bool":
        return seen
    if kind == "keys":  # broadcast over the queries
        return seen[:, :, 1:2]
    return torch.where(seen, floats(2, 1, queries, keys, seed=6), -torch.inf)


ATTENTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 3},
    "window_both_ways": {"window": 4},
    "uniform": {"uniform_if_blind": True},
    "uniform_causal": {"uniform_if_blind": True, "causal": True},
    "softcap": {"softcap": 1.5, "causal": True},
    "softcap_uniform": {"softcap": 1.5, "uniform_if_blind": True},
    "sinks": {"sinks": floats(6, seed=8), "causal": True},
    "sinks_window": {"sinks": floats(6, seed=8), "causal": True, "window": 2},
}


@pytest.mark.parametrize("mask", ["none", "bool", "keys", "float"])
@pytest.mark.parametrize("form", ATTENTIONS)
def test_attention_equals_its_reference(form: str, mask: str, tmp_path: Path) -> None:
    for queries, keys, kv_heads in ((5, 5, 6), (3, 8, 2)):
        q, k, v = heads(6, queries, 8), heads(kv_heads, keys, 8, 1), heads(kv_heads, keys, 5, 2)
        # Minus infinity over a whole row of an additive mask has no meaning without a sink.
        blind = form != "softcap" or mask != "float"
        shown = attention_mask(mask, queries, keys, blind)
        words = {"scale": 0.4, "mask": shown, **ATTENTIONS[form]}
        check(tmp_path, own.attention.default, (q, k, v), words)


def test_attention_that_onnx_can_say_is_one_node(tmp_path: Path) -> None:
    q, k, v = heads(6, 5, 8), heads(2, 5, 8, 1), heads(2, 5, 4, 2)
    words: dict[str, Any] = {"scale": 0.4, "causal": True}
    folder = check(tmp_path, own.attention.default, (q, k, v), words)
    assert op_counts(folder) == {"Attention": 1}


def test_attention_keeps_grouped_keys_as_they_are(tmp_path: Path) -> None:
    q, k, v = heads(6, 5, 8), heads(2, 5, 8, 1), heads(2, 5, 4, 2)
    words: dict[str, Any] = {"scale": 0.4, "softcap": 2.0}
    folder = check(tmp_path, own.attention.default, (q, k, v), words)
    assert op_counts(folder)["Expand"] == 0


def test_scaled_dot_product_attention(tmp_path: Path) -> None:
    q, k, v = heads(6, 4, 8), heads(6, 7, 8, 1), heads(6, 7, 8, 2)
    sdpa = aten.scaled_dot_product_attention.default
    check(tmp_path, sdpa, (q, k, v), {"is_causal": True})
    check(tmp_path, sdpa, (q, k, v, attention_mask("bool", 4, 7)))
    check(tmp_path, sdpa, (q, k, v, floats(6, 4, 7)), {"scale": 1.0})


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [8, 4])
def test_rotary(rotated: int, interleaved: bool, tmp_path: Path) -> None:
    for shape in ((1, 1, 5), (2, 1, 5), (1, 5), (5,)):
        angles = floats(*shape, rotated // 2)
        words = (angles.cos(), angles.sin(), interleaved)
        folder = check(tmp_path, own.rotary.default, (heads(3, 5, 8), *words))
        assert op_counts(folder)["RotaryEmbedding"] == 1


def test_rotary_of_another_layout_is_spelled_out(tmp_path: Path) -> None:
    x, cos = floats(2, 5, 8), floats(5, 4)
    folder = check(tmp_path, own.rotary.default, (x, cos, cos.square()))
    assert op_counts(folder)["RotaryEmbedding"] == 0


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(offset: float, tmp_path: Path) -> None:
    folder = check(tmp_path, own.rms_norm.default, (D, floats(3), 1e-5, offset))
    assert op_counts(folder)["RMSNormalization"] == 1
    check(tmp_path, own.rms_norm.default, (D, None, 1e-5, offset))


@pytest.mark.parametrize(
    "activation", ["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "sigmoid"]
)
def test_gates(activation: str, tmp_path: Path) -> None:
    check(tmp_path, own.gated.default, (X, Y, activation))


def test_quick_gelu(tmp_path: Path) -> None:
    check(tmp_path, own.quick_gelu.default, (X,))


def test_what_is_refused_names_the_node_and_the_reason() -> None:
    program = program_of(aten.conv_transpose1d.default, (D.mT, floats(3, 4, 2)))
    with pytest.raises(UnsupportedByTarget, match="conv") as told:
        build(program, Options(), {})
    assert "in layer" in told.value.where and told.value.found


def test_a_decomposition_for_one_size_only_is_refused() -> None:
    program = program_of(
        aten.im2col.default, (D[..., None], [5, 1], [1, 1], [2, 0], [1, 1]), free=3
    )
    shape = str(program.inputs[0].meta["val"].shape)
    with pytest.raises(UnsupportedByTarget, match="im2col") as told:
        build(program, Options(), {})
    assert "fixes free sizes" in told.value.found
    assert str(program.inputs[0].meta["val"].shape) == shape


def test_reshapes_of_free_axes_are_constants(tmp_path: Path) -> None:
    program = program_of(aten.view.default, (floats(5, 4, 6), [5, 4, 2, 3]), free=0)
    free = program_of(aten.transpose.int, (floats(5, 4, 6), 1, 2), free=2)
    for made in (program, free):
        folder = exported(made, tmp_path / "out")
        assert op_counts(folder)["Shape"] == 0
        assert len(graph_of(folder).node) == 1
