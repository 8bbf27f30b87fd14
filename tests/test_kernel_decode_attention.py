"""Attention over caches: the twin against loops, what is refused, which tiles the splits read."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planish.kernels import decode_attention as kernel
from planish.kernels.decode_cases import CASES, coded
from planish.kernels.decode_shapes import alignment, default_config, split_count
from planish.kernels.decode_tile import decode_share

TWIN = kernel.SPEC.twin


def _double(*sizes, seed):
    return torch.randn(sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _row(q, keys, values, position, *, scale, window=0, first=0, softcap=0.0, sink=None, slope=0.0):
    """One query at `position` over lists of keys and values, by the definition of softmax."""
    logits, taken = [], []
    for j in range(len(keys)):
        if j > position or (window and j <= position - window and j >= first):
            continue
        s = float(q @ keys[j]) * scale
        s = softcap * math.tanh(s / softcap) if softcap else s
        logits.append(s + slope * (j - position))
        taken.append(values[j])
    if not taken:
        return torch.zeros(values.shape[1], dtype=torch.float64)
    top = max([*logits, *([] if sink is None else [sink])])
    weights = [math.exp(s - top) for s in logits]
    total = sum(weights) + (0 if sink is None else math.exp(sink - top))
    return sum(w / total * v for w, v in zip(weights, taken, strict=True))


def _loops(q, k, v, lengths, sinks=None, slopes=None, **options):
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for b, length in enumerate(lengths):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                row = {
                    "sink": None if sinks is None else float(sinks[h]),
                    "slope": 0.0 if slopes is None else float(slopes[h]),
                }
                keys, values = (x[b, h // group, :length] for x in (k, v))
                position = length - q.shape[2] + i
                out[b, h, i] = _row(q[b, h, i], keys, values, position, **row, **options)
    return out


def _problem(lengths=(13, 0, 2, 17), queries=3):
    q = _double(len(lengths), 6, queries, 5, seed=1)
    k, v = _double(len(lengths), 2, 17, 5, seed=2), _double(len(lengths), 2, 17, 7, seed=3)
    return q, k, v, torch.tensor(lengths, dtype=torch.int32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 4},
        {"window": 3, "first": 2},
        {"softcap": 0.7},
        {"sinks": _double(6, seed=4) * 2},
        {"slopes": _double(6, seed=5).abs()},
        {"window": 5, "first": 1, "softcap": 2.0, "sinks": _double(6, seed=6)},
    ],
    ids=["plain", "window", "first", "softcap", "sinks", "slopes", "all"],
)
def test_twin_is_the_definition(options):
    q, k, v, lengths = _problem()
    expected = _loops(q, k, v, lengths.tolist(), scale=0.4, **options)
    torch.testing.assert_close(
        TWIN(q, k, v, lengths, scale=0.4, **options), expected, rtol=0, atol=1e-13
    )


def test_first_tokens_and_position_matter():
    """Options that did nothing would pass the comparison above on a wrong problem."""
    q, k, v, lengths = _problem()
    plain = TWIN(q, k, v, lengths, scale=0.4)
    for options in ({"window": 4}, {"window": 3, "first": 2}, {"softcap": 0.7}):
        assert (TWIN(q, k, v, lengths, scale=0.4, **options) - plain).abs().max() > 1e-3
    near = TWIN(q, k, v, lengths, scale=0.4, window=3)
    assert (TWIN(q, k, v, lengths, scale=0.4, window=3, first=2) - near).abs().max() > 1e-3


def test_pages_in_any_order_are_the_same_cache():
    q, k, v, lengths = _problem()
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, 3)) for x in (k, v))
    table = torch.randperm(20, generator=torch.Generator().manual_seed(0)).reshape(4, 5).int()
    pages = [torch.full((20, 4, 2, x.shape[3]), torch.nan, dtype=torch.float64) for x in (k, v)]
    for paged, whole in zip(pages, (k, v), strict=True):
        for b in range(4):
            for n in range(5):
                paged[table[b, n]] = whole[b, :, 4 * n : 4 * n + 4].transpose(0, 1)
    for b, length in enumerate(lengths.tolist()):
        table[b, -(-length // 4) :] = -7  # entries beyond the end are never followed
    views = [p.transpose(1, 2) for p in pages]
    paged = TWIN(q, *views, lengths, table, scale=0.4)
    assert torch.equal(paged, TWIN(q, k, v, lengths, scale=0.4))


def test_codes_are_what_their_grid_says():
    q, k, v, lengths = _problem(lengths=(16, 9))
    k, v = k[:, :, :16, :4].contiguous(), v[:, :, :16, :4].contiguous()
    q = q[..., :4]
    codes, scale, zero = coded(k, 4, 8, 1)
    assert codes.shape == (2, 2, 16, 2)
    assert scale.shape == (2, 2, 2, 4)
    loose = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).double()
    keys = torch.empty_like(k)
    for t in range(16):
        keys[:, :, t] = loose[:, :, t] * scale[:, :, t // 8].double() + zero[:, :, t // 8].double()
    assert (keys - k).abs().max() <= scale.max() / 2 + 1e-6
    expected = _loops(q, keys, v, lengths.tolist(), scale=0.5)
    got = TWIN(q, codes, v, lengths, k_scale=scale, k_zero=zero, scale=0.5, k_bits=4)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


def test_a_tail_goes_on_where_the_codes_end():
    q, k, v, lengths = _problem()
    coded = torch.tensor([8, 0, 2, 16], dtype=torch.int32)
    tails = []
    for cache in (k, v):
        tail = torch.full((4, 2, 7, cache.shape[3]), torch.nan, dtype=torch.float64)
        for b, (begin, end) in enumerate(zip(coded.tolist(), lengths.tolist(), strict=True)):
            tail[b, :, : end - begin] = cache[b, :, begin:end]
        tails.append(tail)
    before = torch.arange(17) < coded[:, None]
    heads = [x.masked_fill(~before[:, None, :, None], torch.nan) for x in (k, v)]
    for options in ({}, {"window": 6, "first": 2, "slopes": _double(6, seed=5)}):
        expected = TWIN(q, k, v, lengths, scale=0.4, **options)
        got = TWIN(
            q, *heads, lengths, tail_k=tails[0], tail_v=tails[1], coded=coded, scale=0.4, **options
        )
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


def test_the_cache_of_kivi_is_read_as_it_lies():
    """Codes, scales and waiting tokens as passes.kivi_cache keeps them, against its operators."""
    group, bits, head = 4, 4, 8
    old, recent = _double(2, 2, 12, head, seed=1), _double(2, 2, 5, head, seed=2)
    keys = old.unflatten(2, (-1, group))
    values = old.flip(3).unflatten(3, (-1, group))
    parts = []
    for x, axis in ((keys, 3), (values, 4)):
        zero = x.amin(axis, True)
        scale = (x.amax(axis, True) - zero) / 15
        codes = torch.ops.planish.quantize_cache(x, scale, zero, bits)
        width = x.shape[-1]
        loose = torch.ops.planish.dequantize_cache(codes, scale, zero, bits, width=width)
        parts.append((codes, scale, zero, loose))
    (k, ks, kz, loose_k), (v, vs, vz, loose_v) = parts
    whole_k = torch.cat((loose_k.flatten(2, 3), recent), 2)
    whole_v = torch.cat((loose_v.flatten(3, 4), recent.flip(3)), 2)
    q = _double(2, 4, 1, head, seed=3)
    got = TWIN(
        q,
        k.flatten(2, 3),
        v.flatten(3, 4),
        torch.full((2,), 17, dtype=torch.int32),
        k_scale=ks.squeeze(3),
        k_zero=kz.squeeze(3),
        v_scale=vs.squeeze(4),
        v_zero=vz.squeeze(4),
        tail_k=recent,
        tail_v=recent.flip(3),
        coded=torch.full((2,), 12, dtype=torch.int32),
        scale=0.3,
        k_bits=bits,
        v_bits=bits,
    )
    expected = torch.ops.planish.attention(q, whole_k, whole_v, scale=0.3)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


def test_what_lies_beyond_the_end_is_not_read():
    q, k, v, lengths = _problem()
    clean = TWIN(q, k, v, lengths, scale=0.4)
    beyond = torch.arange(17)[None, :] >= lengths[:, None]
    k, v = (x.masked_fill(beyond[:, None, :, None], torch.nan) for x in (k, v))
    assert torch.equal(TWIN(q, k, v, lengths, scale=0.4), clean)


@given(
    length=st.integers(0, 700),
    queries=st.integers(1, 16),
    window=st.integers(0, 200),
    first=st.integers(0, 90),
    splits=st.integers(1, 64),
    tile=st.sampled_from([16, 32, 64]),
)
def test_splits_read_every_visible_tile_once(length, queries, window, first, splits, tile):
    first = first if window else 0
    read = []
    for split in range(splits):
        start, stop, leading, skipped = decode_share.fn(
            length, length - queries, window, first, split, splits, tile
        )
        read += [i if i < leading else i + skipped for i in range(start, stop)]
    visible = {
        j // tile
        for i in range(queries)
        for j in range(max(length - queries + i + 1, 0))
        if not window or j > length - queries + i - window or j < first
    }
    assert len(read) == len(set(read))
    assert visible <= set(read)
    # No tile is read beyond the end, and of a long gap none within it.
    assert all(n * tile < length for n in read)
    most = -(-first // tile) + -(-(window + queries) // tile) + 1
    assert not window or len(read) <= most


@given(programs=st.integers(1, 10_000), tiles=st.integers(0, 5_000))
def test_splits_follow_from_shapes_alone(programs, tiles):
    splits = split_count(programs, tiles, "sm_90")
    assert 1 <= splits <= 64
    assert splits == 1 or splits * 2 <= tiles
    assert splits == 1 or (splits - 1) * programs < 2 * 132


def _meta(**changes):
    def of(*sizes, dtype=torch.float16):
        return torch.empty(sizes, dtype=dtype, device="meta")

    args = {
        "q": of(2, 8, 1, 64),
        "k": of(2, 2, 128, 64),
        "v": of(2, 2, 128, 64),
        "lengths": of(2, dtype=torch.int32),
        "scale": 0.1,
    }
    return args | {name: make(of) if callable(make) else make for name, make in changes.items()}


def _int8(of):
    return of(2, 2, 128, 64, dtype=torch.int8)


_TAIL = {
    "tail_k": lambda of: of(2, 2, 9, 64),
    "tail_v": lambda of: of(2, 2, 9, 64),
    "coded": lambda of: of(2, dtype=torch.int32),
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"q": lambda of: of(2, 8, 16, 64)}, None),
        ({"q": lambda of: of(2, 8, 17, 64)}, "17 new tokens"),
        ({"q": lambda of: of(2, 7, 1, 64)}, "no multiple"),
        ({"q": lambda of: of(2, 8, 1, 64, dtype=torch.float64)}, "float64"),
        ({"q": lambda of: of(2, 8, 1, 32)}, "channels"),
        ({"lengths": lambda of: of(2, dtype=torch.int64)}, "int32"),
        ({"table": lambda of: of(2, 4, dtype=torch.int64)}, "int32"),
        ({"k": lambda of: of(2, 2, 64, 128).transpose(2, 3)}, "side by side"),
        ({"k": lambda of: of(2, 128, 2, 64).transpose(1, 2)}, None),
        ({"k": _int8}, "without a scale"),
        ({"k": _int8, "k_scale": lambda of: of(2, 2, 128, 1)}, None),
        ({"k": _int8, "k_scale": lambda of: of(2, 2, 3, 1)}, "evenly"),
        ({"k": _int8, "k_scale": lambda of: of(3, 2, 128, 1)}, "another batch"),
        (
            {
                "k": _int8,
                "k_scale": lambda of: of(2, 2, 8, 64),
                "k_zero": lambda of: of(2, 2, 64, 8).transpose(2, 3),
            },
            "do not lie",
        ),
        ({"k": lambda of: of(2, 2, 128, 64, dtype=torch.float8_e4m3fn)}, "does not read"),
        ({"k": lambda of: of(2, 2, 128, 64, dtype=torch.float8_e5m2)}, None),
        ({"k_zero": lambda of: of(2, 2, 128, 1)}, "without a scale"),
        ({"tail_k": lambda of: of(2, 2, 9, 64)}, "not all are given"),
        ({**_TAIL}, None),
        ({**_TAIL, "coded": lambda of: of(2, dtype=torch.int64)}, "int64"),
        ({**_TAIL, "tail_v": lambda of: of(2, 2, 9, 32)}, "other channels"),
        ({**_TAIL, "tail_v": lambda of: of(2, 2, 9, 64, dtype=torch.int8)}, "int8"),
    ],
)
def test_why_not(changes, said):
    reason = kernel.why_not("sm_80", **_meta(**changes))
    assert reason is None if said is None else said in reason


def test_architectures_differ():
    eight = _meta(k=lambda of: of(2, 2, 128, 64, dtype=torch.float8_e4m3fn))
    assert kernel.why_not("sm_90", **eight) is None
    assert "gfx942" in kernel.why_not("gfx942", **eight)
    packed = _meta(
        k=lambda of: of(2, 2, 128, 32, dtype=torch.uint8),
        k_scale=lambda of: of(2, 2, 2, 64),
        k_bits=4,
    )
    assert kernel.why_not("sm_80", **packed) is None
    assert "registers" in kernel.why_not("gfx1100", **packed)
    assert "channels" in kernel.why_not("sm_80", **{**packed, "k_bits": 2})


def test_every_case_is_one_that_the_kernel_takes():
    for case in CASES:
        args = case.make(torch.Generator().manual_seed(0))
        for arch in case.archs:
            assert kernel.why_not(arch, **args) is None, case.name


def test_plan_allocates_parts_only_for_several_splits():
    one = kernel.plan(**_meta(k=lambda of: of(2, 2, 64, 64), v=lambda of: of(2, 2, 64, 64)))
    assert [launch.grid for launch in one.launches] == [(1, 2, 2)]
    assert one.launches[0].args["LSE"] is None
    two = kernel.plan(**_meta(), config=kernel.CONFIGS[2])
    partial, combine = two.launches
    splits = partial.args["splits"]
    assert splits == 4  # 128 tokens are 8 tiles of 16, two to a split
    assert combine.grid == (2 * 8 * 1,)
    assert partial.args["OUT"].shape == (2, 8, 1, splits, 64)
    assert two.outputs[0].shape == (2, 8, 1, 64)


def test_a_tail_is_a_launch_of_its_own_beside_the_codes():
    plan = kernel.plan(**_meta(**_TAIL), config=kernel.CONFIGS[2])
    codes, tail, _ = plan.launches
    assert (codes.args["splits"], codes.args["before"], codes.args["parts"]) == (4, 0, 5)
    assert (tail.args["splits"], tail.args["before"], tail.args["parts"]) == (1, 4, 5)
    assert (codes.constants["TAIL"], tail.constants["TAIL"]) == (False, True)
    empty = _meta(**_TAIL, k=lambda of: of(2, 2, 0, 64), v=lambda of: of(2, 2, 0, 64))
    assert kernel.why_not("sm_80", **empty) is None
    assert [one.args["before"] for one in kernel.plan(**empty).launches[:2]] == [0, 1]


def test_tiles_follow_the_head():
    assert default_config(64, 64, 2, "sm_80").constants["BN"] == 64
    assert default_config(256, 256, 4, "sm_80").constants["BN"] == 16
    assert default_config(64, 64, 2, "gfx1100").num_warps == 8


def test_alignment_is_of_every_row():
    base = torch.empty(4, 3, 40, dtype=torch.float16)
    assert alignment(base) == 16
    assert alignment(base[..., 4:]) == 8
    assert alignment(base[:, :, 1:]) == 2
    assert alignment(base[:1, :1, 8:]) == 16
    assert alignment(torch.empty(2, 3, 36, dtype=torch.float16)) == 8


def test_cost_counts_what_a_window_leaves():
    whole, near = kernel.cost(**_meta()), kernel.cost(**_meta(window=27, first=4))
    assert whole.flops == 2 * 2 * 8 * 128 * 128
    assert near.flops == whole.flops // 4
    assert whole.nbytes == 2 * 2 * 8 * 64 * 2 + 2 * 2 * 2 * 128 * 64 * 2


def test_operator_runs_the_twin_and_knows_its_shape():
    q, k, v, lengths = _problem()
    out = torch.ops.planish.decode_attention(q, k, v, lengths, scale=0.4)
    assert torch.equal(out, TWIN(q, k, v, lengths, scale=0.4))
    meta = torch.ops.planish.decode_attention(*(x.to("meta") for x in (q, k, v, lengths)), scale=1)
    assert meta.shape == (4, 6, 3, 7)
