"""Flash attention: its meaning, what it refuses, what it leaves unread, what it costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.ir.ops import _attention as reference
from planish.kernels.attention import SPEC, plan
from planish.kernels.attention_limits import cost, visible_pairs, why_not
from planish.kernels.attention_problems import (
    block_map,
    poisoned,
    problem,
    starts,
    stored,
    with_tensors,
)
from planish.kernels.attention_shapes import CONFIGS, piece, pieces
from planish.kernels.attention_twin import flash_attention, result_like
from planish.kernels.ladder_execute import run_case
from planish.kernels.launch import Config
from planish.kernels.occupancy import shared_limit
from planish.kernels.triton_spec import ARCHS, Case
from torch import Tensor

F64 = torch.float64
# Two ways to add up a few hundred products in float64.
NEAR = {"rtol": 1e-11, "atol": 1e-11}


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _args(*shape: int, **options: Any) -> dict[str, Any]:
    return dict(problem(*shape, **options)(_generator()))


@st.composite
def _attentions(draw: st.DrawFn) -> dict[str, Any]:
    batch, kv_heads, group = (draw(st.integers(1, 2)) for _ in range(3))
    queries, keys = draw(st.integers(1, 9)), draw(st.integers(1, 12))
    heads, head, value = kv_heads * group, draw(st.integers(1, 6)), draw(st.integers(1, 5))
    generator = _generator(draw(st.integers(0, 99)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    args: dict[str, Any] = {
        "q": normal(batch, heads, queries, head),
        "k": normal(batch, kv_heads, keys, head),
        "v": normal(batch, kv_heads, keys, value),
        "scale": draw(st.sampled_from([0.3, 1.0])),
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from([0, 1, 3, 20])),
        "softcap": draw(st.sampled_from([0.0, 2.0])),
        "uniform_if_blind": draw(st.booleans()),
    }
    kind = draw(st.sampled_from(["none", "bool", "keys", "bias", "-inf"]))
    shape = draw(st.sampled_from([(queries, keys), (batch, 1, queries, keys), (1, heads, 1, keys)]))
    if kind == "bool":
        args["mask"] = torch.rand(shape, generator=generator) > 0.5
    elif kind == "keys":
        args["mask"] = torch.rand(batch, 1, 1, keys, generator=generator) > 0.7
    elif kind != "none":
        args["mask"] = normal(*shape)
        if kind == "-inf":
            args["mask"][torch.rand(shape, generator=generator) > 0.4] = -math.inf
    if draw(st.booleans()):
        args["sinks"] = normal(heads)
    return args


@settings(max_examples=150, deadline=None)
@given(_attentions())
def test_twin_is_planish_attention(args: dict[str, Any]) -> None:
    if "mask" in args and args["mask"].dtype != torch.bool and not args["uniform_if_blind"]:
        # Nothing adds up to a number here: the reference divides zero by zero.
        hidden = args["mask"].isinf().all(-1).any()
        if hidden and (args["softcap"] or "sinks" in args):
            return
    blind = _blind(args)
    want = reference(**args)
    out, lse = flash_attention(**args)
    if blind.any() and args["softcap"] and not args["uniform_if_blind"] and "sinks" not in args:
        want, out = (x.masked_fill(blind[..., None], 0.0) for x in (want, out))
    torch.testing.assert_close(out, want, **NEAR)
    assert lse.dtype == F64
    torch.testing.assert_close(lse == -math.inf, blind & ("sinks" not in args))


def _blind(args: dict[str, Any]) -> Tensor:
    q, k = args["q"], args["k"]
    place = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    here = torch.arange(k.shape[2])[None, :]
    seen = torch.ones(*q.shape[:3], k.shape[2], dtype=torch.bool)
    if args["causal"]:
        seen = seen & (here <= place)
    if args["window"]:
        seen = seen & (here > place - args["window"])
    if "mask" in args:
        mask = args["mask"]
        seen = seen & (mask if mask.dtype == torch.bool else mask > -math.inf)
    return ~seen.any(-1)


def test_log_sum_exp_is_that_of_the_scores() -> None:
    args = _args(5, 7, 8, dtype=F64)
    _, lse = flash_attention(**args)
    scores = args["q"] @ args["k"].transpose(-1, -2) * args["scale"]
    torch.testing.assert_close(lse, scores.exp().sum(-1).log(), **NEAR)


def test_a_sink_takes_its_share_and_slopes_grow_with_distance() -> None:
    args = _args(1, 2, 4, heads=1, dtype=F64)
    args["q"] = args["q"] * 0
    _, lse = flash_attention(**args, sinks=torch.tensor([1.0], dtype=F64))
    assert lse.item() == pytest.approx(math.log(2 + math.e))
    _, lse = flash_attention(**args, slopes=torch.tensor([0.5], dtype=F64))
    assert lse.item() == pytest.approx(math.log(1 + math.exp(-0.5)))


def test_packed_sequences_are_sequences() -> None:
    lengths = ((3, 5), (0, 2), (4, 4))
    args = _args(7, 11, 8, heads=4, kv_heads=2, dtype=F64, causal=True, window=3)
    firsts = starts(*(q for q, _ in lengths))(_generator())
    key_firsts = starts(*(k for _, k in lengths))(_generator())
    out, lse = flash_attention(**args, query_starts=firsts, key_starts=key_firsts)
    q_at = k_at = 0
    for queries, keys in lengths:
        part = dict(args, q=args["q"][:, :, q_at : q_at + queries])
        part |= {name: args[name][:, :, k_at : k_at + keys] for name in ("k", "v")}
        one, one_lse = flash_attention(**part)
        torch.testing.assert_close(out[:, :, q_at : q_at + queries], one, **NEAR)
        torch.testing.assert_close(lse[:, :, q_at : q_at + queries], one_lse, **NEAR)
        q_at, k_at = q_at + queries, k_at + keys


def test_a_block_map_is_a_mask_of_blocks() -> None:
    args = _args(40, 50, 8, dtype=F64, causal=True)
    blocks = block_map("1011", "0100", "1101")(_generator())
    mask = blocks.repeat_interleave(16, 2).repeat_interleave(16, 3)[..., :40, :50]
    sizes = {"block_queries": 16, "block_keys": 16}
    mapped = flash_attention(**args, blocks=blocks, **sizes)
    masked = flash_attention(**args, mask=mask)
    torch.testing.assert_close(mapped, masked, **NEAR)


@pytest.mark.parametrize("axes", [0, 2, 3])
def test_codes_are_worth_their_scales(axes: int) -> None:
    args = dict(stored(problem(5, 9, 8, heads=4, kv_heads=2), torch.int8, axes)(_generator()))
    wide = dict(args, q=args["q"].double())
    plain = dict(wide)
    for name in ("k", "v"):
        scale = plain.pop(f"{name}_scale").double()
        plain[name] = args[name].double() * scale.expand(1, 2, 9)[..., None]
    torch.testing.assert_close(flash_attention(**wide), flash_attention(**plain), **NEAR)


def test_the_result_lies_as_the_queries_do() -> None:
    q = torch.empty(2, 5, 3, 16).transpose(1, 2)
    v = torch.empty(2, 3, 7, 24)
    assert result_like(q, v).stride() == torch.empty(2, 5, 3, 24).transpose(1, 2).stride()
    assert result_like(q.contiguous(), v).is_contiguous()


def test_the_operator_and_its_shape_rule() -> None:
    args = _args(5, 9, 16, dtype=torch.bfloat16, causal=True)
    operator = torch.ops.planish.flash_attention
    out, lse = operator(**args)
    torch.testing.assert_close((out, lse), flash_attention(**args))
    metas = {n: x.to("meta") if isinstance(x, Tensor) else x for n, x in args.items()}
    for have, want in zip(operator(**metas), (out, lse), strict=True):
        assert (have.shape, have.dtype, have.stride()) == (want.shape, want.dtype, want.stride())


def test_heads_are_cut_into_powers_of_two() -> None:
    known = {20: (16, 16), 64: (64, 0), 80: (64, 16), 96: (64, 32), 128: (128, 0), 192: (128, 64)}
    assert {head: piece(head) for head in known} == known
    for head in range(1, 257):
        first, second = piece(head)
        assert first & (first - 1) == 0 and second & (second - 1) == 0
        assert head <= first + second < max(2 * head, 33)


def test_warps_keep_their_rows_where_they_multiply_alone() -> None:
    q = torch.empty(1, 2, 64, 128)
    assert pieces(q, q, 64, "sm_80")["V1"] == 64
    assert pieces(q, q, 128, "sm_80")["V1"] == 128
    assert pieces(q, q, 64, "sm_90")["V1"] == 128


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("head", [8, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_configuration_fits(arch: str, head: int, dtype: torch.dtype) -> None:
    q = torch.empty(1, 2, 4096, head, dtype=dtype, device="meta")
    for config in (None, *(config for config in CONFIGS if config.serves(arch))):
        launch = plan(q, q, q, scale=1.0, config=config, arch=arch).launches[0]
        tile, width = launch.constants["BM"], launch.constants["BN"]
        rows, stages = tile, launch.num_stages
        if arch.startswith("gfx"):  # queries and one stage of keys are in registers
            rows, stages = 0, max(1, stages - 1)
        nbytes = (rows + 2 * stages * width) * head * dtype.itemsize
        assert nbytes <= shared_limit(arch)
        assert min(tile, width) >= 16


def _refused(arch: str = "sm_90", **changes: Any) -> str | None:
    args = _args(20, 40, 64, heads=4, kv_heads=2, batch=2)
    return why_not(arch, **{**args, **changes})


def _shaped(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


E4M3 = torch.float8_e4m3fn
INTS = torch.tensor([0, 20], dtype=torch.int32)
MAP = torch.ones(2, 4, 2, 3, dtype=torch.bool)
BLOCKS = {"block_queries": 16, "block_keys": 16}
WIDE_ROWS = _shaped(2, 20, 4, 128)[..., ::2].transpose(1, 2)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"q": _shaped(2, 4, 20, 64, dtype=F64)}, "its queries are torch.float64"),
        ({"k": _shaped(2, 2, 40, 64, dtype=torch.bfloat16)}, "its keys are torch.bfloat16"),
        ({"v": _shaped(2, 2, 40, 64, dtype=torch.uint8)}, "its values are torch.uint8"),
        ({"q": _shaped(4, 20, 64)}, "3, 4 and 4 axes"),
        ({"q": _shaped(1, 4, 20, 64)}, "do not belong together"),
        ({"v": _shaped(2, 2, 39, 64)}, "do not belong together"),
        ({"q": _shaped(2, 4, 20, 32)}, "32 channels and its keys 64"),
        ({"q": _shaped(2, 3, 20, 64)}, "its 3 heads are no multiple of the 2"),
        ({"v": _shaped(2, 2, 40, 257)}, "its value head has 257 channels"),
        ({"q": WIDE_ROWS}, "the channels of its queries do not lie side by side"),
        ({"scale": 0.0}, "its scale is 0.0"),
        ({"window": -1}, "its window is -1"),
        ({"softcap": -2.0}, "its soft cap is -2.0"),
        ({"mask": _shaped(21, 40)}, "its mask [21, 40] does not broadcast"),
        ({"mask": _shaped(20, 40, dtype=torch.int32)}, "its mask is torch.int32"),
        ({"sinks": _shaped(2)}, "its sinks have the shape [2] instead of [4]"),
        ({"slopes": _shaped(4, dtype=torch.int32)}, "its slopes are no contiguous vector"),
        ({"k_scale": _shaped(2, 2, 39)}, "its key scales [2, 2, 39] do not fit"),
        ({"v_scale": _shaped(2, 2, 40, dtype=torch.int8)}, "its value scales are torch.int8"),
        ({"query_starts": INTS}, "it packs only queries or only keys"),
        ({"query_starts": INTS, "key_starts": INTS}, "in a batch of 2"),
        ({"query_starts": INTS, "key_starts": INTS.long()}, "not int32"),
        ({"query_starts": INTS, "key_starts": INTS[:1]}, "its starts do not belong together"),
        ({"query_starts": INTS, "key_starts": INTS, "mask": _shaped(20, 40)}, "a mask over packed"),
        ({"blocks": MAP, "block_queries": 16, "block_keys": 24}, "16 x 24, not powers of two"),
        ({"blocks": MAP.long(), **BLOCKS}, "its block map is torch.int64"),
        ({"blocks": MAP[:, :, :1], **BLOCKS}, "is smaller than [2, 3]"),
        ({"blocks": MAP[:, :3], **BLOCKS}, "is for other heads"),
        ({"blocks": MAP, "uniform_if_blind": True, **BLOCKS}, "its blind queries take the mean"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], word: str) -> None:
    sentence = _refused(**changes)
    assert sentence is not None and word in sentence


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"v": _shaped(2, 2, 40, 256)},
        {"mask": _shaped(20, 1)},
        {"mask": _shaped(2, 1, 1, 40, dtype=torch.bool), "uniform_if_blind": True},
        {"sinks": _shaped(4), "slopes": _shaped(4, dtype=torch.float32)},
        {"k": _shaped(2, 2, 40, 64, dtype=torch.int8), "k_scale": _shaped(2, 2, 1)},
        {"blocks": MAP, **BLOCKS},
        {"blocks": MAP[:1, :1].int(), **BLOCKS},
    ],
)
def test_what_is_not_refused(changes: dict[str, Any]) -> None:
    assert _refused(**changes) is None


def test_some_architectures_refuse_more() -> None:
    small = {"k": _shaped(2, 2, 40, 64, dtype=E4M3)}
    assert "float8_e4m3fn, which sm_80 does not have" in str(_refused("sm_80", **small))
    assert _refused("sm_89", **small) is None
    wide = {name: _shaped(2, 2, 40, 192) for name in ("q", "k", "v")}
    assert "its head has 192 channels" in str(_refused("gfx1100", **wide))
    assert _refused("gfx942", **wide) is None


TILE = Config({"BM": 32, "BN": 32}, num_warps=2, num_stages=2)
# What a tile of 32 keys and its values take of memory, in sectors of 32 bytes.
TILE_SECTORS = 2 * 32 * 64 * 2 // 32


def _sectors(make: Any) -> int:
    ran = run_case(SPEC, Case("counted", make, TILE), "sm_80")
    assert ran.verdict.right, ran.verdict.sentence
    return ran.counts["sectors read"]


def _sparse(*rows: str) -> Any:
    sizes = {"block_queries": 32, "block_keys": 64}
    return problem(64, 128, heads=1, **sizes, extra=with_tensors(blocks=block_map(*rows)))


def test_tiles_that_a_block_map_leaves_out_are_not_loaded() -> None:
    full, sparse = _sectors(_sparse("11", "11")), _sectors(poisoned(_sparse("01", "01"), 0, 64))
    # A tile that is left out is not in the list either: at most a sector for each warp.
    assert 4 * TILE_SECTORS <= full - sparse <= 4 * (TILE_SECTORS + 2)


def test_tiles_outside_of_the_window_are_not_loaded() -> None:
    whole = _sectors(problem(64, 128, heads=1))
    near = _sectors(poisoned(problem(64, 128, heads=1, causal=True, window=32), 0, 32))
    # Of 2 x 4 tiles the first queries see tiles 1 and 2, the last 2 and 3; a masked load at an
    # edge is as long.
    assert whole - near == 4 * TILE_SECTORS


@given(st.integers(0, 9), st.integers(0, 9), st.booleans(), st.integers(0, 12))
def test_pairs_that_are_counted(queries: int, keys: int, causal: bool, window: int) -> None:
    place = torch.arange(queries)[:, None] + keys - queries
    here = torch.arange(keys)[None, :]
    seen = (here <= place) if causal else torch.ones(queries, keys, dtype=torch.bool)
    if window:
        seen = seen & (here > place - window)
    assert visible_pairs(queries, keys, causal, window) == int(seen.sum())


def test_cost() -> None:
    q = torch.empty(2, 4, 10, 16, dtype=torch.float16)
    k = torch.empty(2, 2, 30, 16, dtype=torch.int8)
    v = torch.empty(2, 2, 30, 8, dtype=torch.float16)
    scales = torch.empty(2, 2, 30)
    found = cost(q, k, v, k_scale=scales, causal=True, scale=1.0)
    read = 2 * q.numel() + k.numel() + 2 * v.numel() + 4 * scales.numel()
    assert found.nbytes == read + 2 * 4 * 10 * (8 * 2 + 4)
    assert found.flops == 2 * (2 * 4) * sum(range(21, 31)) * (16 + 8)
