"""Attention for a GPU: FlexAttention against the operation on the CPU, and which one is chosen."""

from __future__ import annotations

import operator
import warnings
from typing import Any

import build
import pytest
import torch
from planish import backend_weights
from planish.codegen import lower_gpu
from planish.codegen.lower_cpu import lower_for_cpu
from planish.codegen.lower_gpu import lower_for_gpu, on_gpu
from planish.ir.edit import current_editor
from planish.ir.errors import MissingExtra
from planish.ir.program import Program
from planish.kernels import attention_flex as flex
from planish.kernels import operator as kernel_operator
from planish.kernels.attention import SPEC as FLASH
from planish.kernels.attention_flex import attention_flex
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import flex_attention as torch_flex

attention = torch.ops.planish.attention.default
flash = getattr(torch.ops.planish, FLASH.operator.split("::")[1]).default


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention's own arithmetic, without a compiler."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    warnings.filterwarnings("ignore", message="flex_attention called without")


def tensors(queries: int, keys: int, heads: int = 6, kv_heads: int = 2) -> list[Tensor]:
    torch.manual_seed(queries * 1000 + keys)
    shapes = [(2, heads, queries, 16), (2, kv_heads, keys, 16), (2, kv_heads, keys, 32)]
    return [torch.randn(shape) for shape in shapes]


def assert_as_good(
    parts: list[Tensor], mask: Tensor | None, sinks: Tensor | None, **form: Any
) -> None:
    """No further from float64 than the operation in float32, four times that granted."""
    wide = [part.double() for part in parts]
    additive = mask is not None and mask.is_floating_point()
    wide_mask = mask.double() if additive and mask is not None else mask
    wide_sinks = None if sinks is None else sinks.double()
    truth = attention(*wide, wide_mask, wide_sinks, **form)
    own = (attention(*parts, mask, sinks, **form) - truth).abs().max()
    got = attention_flex(*parts, mask, sinks, **form)
    assert got.shape == truth.shape and got.dtype == parts[0].dtype
    assert (got - truth).abs().max() <= 4 * (own + torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("window", [0, 4, 150, 1000])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (1, 9), (3, 300), (257, 257), (130, 400)])
def test_it_computes_the_operation(
    window: int, softcap: float, with_sinks: bool, queries: int, keys: int
) -> None:
    sinks = torch.randn(6) if with_sinks else None
    form = {"scale": 0.3, "causal": True, "window": window, "softcap": softcap}
    assert_as_good(tensors(queries, keys), None, sinks, **form)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 1, 140), (1, 6, 140, 140), (2, 1, 140, 140)])
@pytest.mark.parametrize("boolean", [False, True])
def test_masks_of_every_form(causal: bool, shape: tuple[int, ...], boolean: bool) -> None:
    parts = tensors(140, 140)
    mask: Tensor = torch.rand(shape) > 0.2
    mask[..., 0] = True
    if not boolean:
        mask = torch.where(mask, 0.0, -3.0)
    form = {"scale": 0.3, "causal": causal, "softcap": 4.0}
    assert_as_good(parts, mask, torch.randn(6), **form)


def test_blind_queries_give_zeros() -> None:
    parts = tensors(5, 5)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[1, ..., :2] = False
    got = attention_flex(*parts, mask, scale=0.3, causal=True, softcap=2.0)
    assert not got[1, :, :2].any() and got[1, :, 2:].any()
    assert_as_good(parts, mask, None, scale=0.3, causal=True, softcap=2.0)


@pytest.mark.parametrize("window", [0, 1, 100, 129, 300])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (128, 128), (130, 700), (500, 500)])
def test_blocks_are_the_ones_that_the_rule_needs(
    window: int, causal: bool, queries: int, keys: int
) -> None:
    """Every block with a visible key is listed, whole ones only where every key is visible."""
    partial, at, full, full_at = flex._blocks(
        queries, keys, causal, window, False, torch.device("cpu")
    )
    assert full is not None and full_at is not None
    seen = torch.ones(queries, keys, dtype=torch.bool)
    row, column = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)[None]
    if causal:
        seen &= column <= row
    if window:
        seen &= column > row - window
    for i in range(partial.shape[-1]):
        some = set(at[0, 0, i, : int(partial[0, 0, i])].tolist())
        whole = set(full_at[0, 0, i, : int(full[0, 0, i])].tolist())
        assert not some & whole
        for j in range(at.shape[-1]):
            block = seen[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128]
            assert not block.any() or j in some | whole, (i, j)
            assert j not in whole or bool(block.all()), (i, j)
            assert block.any() or j not in whole


def test_block_masks_are_kept_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []
    blocks = flex._blocks

    def counted(queries: int, keys: int, *rest: Any) -> Any:
        made.append((queries, keys))
        return blocks(queries, keys, *rest)

    monkeypatch.setattr(flex, "_blocks", counted)
    monkeypatch.setattr(flex, "_kept", {})
    for queries in (7, 7, 8):
        attention_flex(*tensors(queries, 9), scale=1.0, causal=True, window=3)
    assert made == [(7, 9), (8, 9)]


def test_it_traces_once_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a compiler sees it: the fused operation in the graph, for any number of tokens."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_flex(q, k, v, scale=0.3, causal=True, window=4, softcap=5.0)

    with torch.no_grad():
        graph = make_fx(call, tracing_mode="symbolic")(*tensors(5, 9))
        targets = [str(node.target) for node in graph.graph.nodes]
        assert "flex_attention" in targets
        for queries, keys in ((6, 11), (140, 300)):
            parts = tensors(queries, keys)
            torch.testing.assert_close(graph(*parts), call(*parts))


def program(device: str, head: int = 8, **form: Any) -> Program:
    """One attention whose values lie on a device."""

    def body(q: Any, k: Any, v: Any) -> Any:
        made = current_editor().emit(attention, q, k, v, scale=0.5, causal=True, **form)
        with FakeTensorMode() as mode:
            value = torch.empty(made.meta["val"].shape, device=device)
        assert value.fake_mode is mode
        made.meta["val"] = value
        return made

    parts = [torch.randn(1, 2, 5, head) for _ in range(3)]
    return build.program(body, dict(zip("qkv", parts, strict=True)), free=False)


def without_triton() -> str:
    raise MissingExtra("GPU kernels need the package triton")


def calls(program: Program) -> list[Any]:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({"window": 3}, None),
        ({"softcap": 3.0}, None),
        ({}, "it has no window, soft cap or sinks"),
    ],
)
def test_without_triton_the_device_and_the_form_decide(
    form: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lower_gpu, "check_triton", without_triton)
    made = program("cuda", **form)
    assert on_gpu(made) and not on_gpu(program("cpu", **form))
    lowered, sentences = lower_for_gpu(made)
    assert calls(lowered) == [attention_flex if reason is None else attention]
    assert "need the package triton" in sentences[0]
    assert sentences[1].endswith(reason or "runs by FlexAttention")
    assert attention in calls(made), "the program is left alone"
    lowered, sentences = lower_for_gpu(program("cpu", **form))
    assert sentences[-1].endswith("because it runs on the CPU")


@pytest.mark.parametrize("form", [{"window": 3}, {"softcap": 3.0}, {}])
def test_with_triton_our_kernel_runs_attention(form: dict[str, Any]) -> None:
    lowered, sentences = lower_for_gpu(program("cuda", **form), "sm_90")
    assert calls(lowered) == [flash, operator.getitem]
    assert sentences == []
    assert calls(lower_for_gpu(program("cpu", **form), "sm_90")[0]) == [attention]


def test_what_our_kernel_declines_goes_the_other_ways() -> None:
    lowered, sentences = lower_for_gpu(program("cuda", window=3, head=260), "sm_90")
    assert calls(lowered) == [attention_flex]
    assert "260 channels" in sentences[0] and sentences[1].endswith("runs by FlexAttention")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_compiler_backend_lowers_for_its_device(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_operator, "this_arch", lambda: "sm_90")
    module = backend_weights._lower(program(device, window=3))
    targets = [node.target for node in module.graph.nodes if node.op == "call_function"]
    assert targets == ([flash, operator.getitem] if device == "cuda" else [attention])


def test_what_is_on_a_gpu_gets_no_cpu_kernel() -> None:
    lowered, sentences = lower_for_cpu(program("cuda"))
    assert [n.target for n in lowered.graph.nodes if n.op == "call_function"] == [attention]
    assert not sentences


@pytest.mark.parametrize("triton", [True, False])
def test_a_lowered_graph_runs(triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where our kernel's operator is its twin."""
    if not triton:
        monkeypatch.setattr(lower_gpu, "check_triton", without_triton)
    made = program("cuda", window=3)
    lowered, _ = lower_for_gpu(made, "sm_90")
    parts = list(made.examples)
    (got,) = lowered.to_module()(*parts)
    torch.testing.assert_close(got, attention(*parts, scale=0.5, causal=True, window=3))
