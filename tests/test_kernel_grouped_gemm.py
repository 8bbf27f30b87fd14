"""Routing to experts, their linear layers and their sums: twins against loops, what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.kernels import combine_experts, grouped_gemm, route_experts
from planish.kernels.grouped_cases import CASES
from planish.kernels.route_experts import capacity

ROUTE = route_experts.SPEC.twin
GEMM = grouped_gemm.SPEC.twin
COMBINE = combine_experts.SPEC.twin


def _normal(*sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sizes, generator=generator, dtype=torch.float64)


@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 12),
    k=st.integers(1, 4),
    block=st.sampled_from([16, 32]),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_every_pair_has_one_place_in_a_block_of_its_expert(tokens, experts, k, block, seed):
    k = min(k, experts)
    logits = _normal(tokens, experts, seed=seed).round(decimals=1)
    ids, weights, places, owners = ROUTE(logits, k, False, block)
    pairs = tokens * k
    assert places.shape == (capacity(pairs, experts, block),)
    assert owners.shape == (places.shape[0] // block,)
    named = [p for p in places.tolist() if p != pairs]
    assert sorted(named) == list(range(pairs))
    for b, owner in enumerate(owners.tolist()):
        mine = [p for p in places[b * block : (b + 1) * block].tolist() if p != pairs]
        assert mine == sorted(mine)
        assert bool(mine) == (owner >= 0)
        assert all(ids[p // k, p % k] == owner for p in mine)
    assert weights.shape == ids.shape == (tokens, k)


@given(pairs=st.integers(0, 500), experts=st.integers(1, 64), block=st.sampled_from([16, 64, 128]))
def test_capacity_is_enough_for_the_worst_routing_and_not_a_block_more(pairs, experts, block):
    used = min(pairs, experts)
    # The worst: all experts but one have one pair more than whole blocks, and so has the last.
    worst, left = used * block, pairs - used
    worst += left // block * block
    assert capacity(pairs, experts, block) % block == 0
    assert worst <= capacity(pairs, experts, block) < worst + block + 1


def test_weights_before_and_after_the_choice():
    logits = _normal(9, 6, seed=0)
    ids, before, _, _ = ROUTE(logits, 3)
    _, after, _, _ = ROUTE(logits, 3, True)
    for t in range(9):
        falling = sorted(range(6), key=lambda e: -float(logits[t, e]))[:3]
        assert ids[t].tolist() == falling
        exponents = [float(logits[t, e].exp()) for e in range(6)]
        for j, e in enumerate(falling):
            assert before[t, j].item() == pytest.approx(exponents[e] / sum(exponents), abs=1e-14)
            chosen = sum(exponents[c] for c in falling)
            assert after[t, j].item() == pytest.approx(exponents[e] / chosen, abs=1e-14)
    assert before.sum(1).max() < 0.999


def test_equal_logits_choose_the_first():
    ids, _, _, _ = ROUTE(torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0]]), 4)
    assert ids.tolist() == [[1, 2, 4, 0]]


def _layer(second=False):
    logits = _normal(11, 5, seed=1)
    ids, weights, places, owners = ROUTE(logits, 2, True, 16)
    x = _normal(22 if second else 11, 6, seed=2)
    return ids, weights, x, _normal(5, 7, 6, seed=3), places, owners


@pytest.mark.parametrize("second", [False, True])
def test_twin_is_the_definition(second):
    ids, _, x, weight, places, owners = _layer(second)
    bias, gate, residual = _normal(5, 7, seed=4), _normal(22, 7, seed=5), _normal(22, 7, seed=6)
    out = GEMM(x, weight, places, owners, 22, bias, gate, residual, "silu")
    for pair in range(22):
        expert = int(ids[pair // 2, pair % 2])
        y = weight[expert] @ x[pair if second else pair // 2] + bias[expert]
        expected = y * torch.sigmoid(y) * gate[pair] + residual[pair]
        torch.testing.assert_close(out[pair], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "quick_gelu", "relu", "sigmoid"])
def test_activations_are_those_of_their_names(name):
    _, _, x, weight, places, owners = _layer()
    plain = GEMM(x, weight, places, owners, 22)
    expected = {
        "gelu": lambda y: y * 0.5 * (1 + torch.erf(y / 2**0.5)),
        "gelu_tanh": lambda y: (
            y * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
        ),
        "quick_gelu": lambda y: y / (1 + torch.exp(-1.702 * y)),
        "relu": lambda y: y.clamp_min(0),
        "sigmoid": lambda y: 1 / (1 + torch.exp(-y)),
    }[name](plain)
    out = GEMM(x, weight, places, owners, 22, activation=name)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


def test_a_mixture_of_experts_from_the_three_operations():
    ids, weights, x, weight, places, owners = _layer()
    down = _normal(5, 6, 7, seed=7)
    hidden = GEMM(x, weight, places, owners, 22, activation="relu")
    y = COMBINE(GEMM(hidden, down, places, owners, 22), weights, added=x)
    for t in range(11):
        expected = x[t].clone()
        for j in range(2):
            e = int(ids[t, j])
            expected += weights[t, j] * (down[e] @ (weight[e] @ x[t]).clamp_min(0))
        torch.testing.assert_close(y[t], expected, rtol=0, atol=1e-12)


def _meta(**changes):
    def of(*sizes, dtype=torch.float16):
        return torch.empty(sizes, dtype=dtype, device="meta")

    args = {
        "x": of(8, 64),
        "weight": of(4, 48, 64),
        "places": of(64, dtype=torch.int32),
        "owners": of(4, dtype=torch.int32),
        "pairs": 16,
    }
    return args | {name: make(of) if callable(make) else make for name, make in changes.items()}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"weight": lambda of: of(4, 48, 64, dtype=torch.bfloat16)}, "weights"),
        ({"x": lambda of: of(8, 64, dtype=torch.float64)}, "float64"),
        ({"owners": lambda of: of(8, dtype=torch.int32)}, "blocks have 8"),
        ({"owners": lambda of: of(4, dtype=torch.int64)}, "int32"),
        ({"pairs": 15}, "no multiple"),
        ({"activation": "swish"}, "swish"),
        ({"activation": "gelu"}, None),
        ({"weight": lambda of: of(4, 64, 48).transpose(1, 2)}, "side by side"),
        ({"weight": lambda of: of(4, 48, 80)[..., :64]}, None),
    ],
)
def test_why_not(changes, said):
    reason = grouped_gemm.why_not("sm_80", **_meta(**changes))
    assert reason is None if said is None else said in reason


@pytest.mark.parametrize(
    ("sizes", "k", "block", "said"),
    [
        ((3, 512), 16, 64, None),
        ((3, 513), 2, 64, "513"),
        ((3, 64), 17, 64, "17 of 64"),
        ((3, 4), 5, 64, "5 of 4"),
        ((3, 4), 4, 64, None),
        ((3, 4), 2, 48, "48 rows"),
    ],
)
def test_why_not_of_routing(sizes, k, block, said):
    reason = route_experts.why_not("sm_80", torch.empty(sizes), k, False, block)
    assert reason is None if said is None else said in reason


def test_why_not_of_combining():
    y, weights = torch.empty(8, 5), torch.empty(4, 2)
    assert combine_experts.why_not("sm_80", y, weights) is None
    assert "contiguous" in combine_experts.why_not("sm_80", y, torch.empty(2, 4).T)
    assert "side by side" in combine_experts.why_not("sm_80", torch.empty(5, 8).T, weights)
    assert "float64" in combine_experts.why_not("sm_80", y.double(), weights)


def test_every_case_is_one_that_the_kernel_takes():
    for case in CASES:
        args = case.make(torch.Generator().manual_seed(0))
        assert grouped_gemm.why_not("sm_90", **args) is None, case.name


def test_chunks_cover_the_pairs_and_their_shares_the_places():
    for tokens in (1, 31, 700, 3000):
        logits = torch.empty(tokens, 12, device="meta")
        plan = route_experts.plan(logits, 3, block=16)
        count = next(one for one in plan.launches if one.name == "route_count_kernel")
        (chunks,) = count.grid
        assert chunks <= 128
        assert (chunks - 1) * count.args["chunk_size"] < 3 * tokens
        assert chunks * count.args["chunk_size"] >= 3 * tokens
        assert chunks * count.args["fill_size"] >= count.args["capacity"]


def test_plan_has_a_row_of_programs_for_every_block():
    (launch,) = grouped_gemm.plan(**_meta(), config=grouped_gemm.CONFIGS[1]).launches
    assert launch.grid == (1, 4)
    assert launch.constants["BM"] == 16
    assert launch.args["share"] == 2
    assert grouped_gemm.plan(**_meta(pairs=0)).launches[0].grid[1] == 0


def test_cost_counts_experts_that_can_be_needed():
    whole, few = grouped_gemm.cost(**_meta()), grouped_gemm.cost(**_meta(pairs=2))
    assert whole.nbytes == 2 * (8 * 64 + 16 * 48 + 4 * 48 * 64)
    assert few.nbytes == 2 * (8 * 64 + 2 * 48 + 2 * 48 * 64)
    assert whole.flops == 2 * 16 * 48 * 64


def test_operators_run_the_twins_and_know_their_shapes():
    _, weights, x, weight, places, owners = _layer()
    routed = torch.ops.planish.route_experts(_normal(11, 5, seed=1), 2, True, 16)
    assert torch.equal(routed[2], places)
    made = torch.ops.planish.grouped_gemm(x, weight, places, owners, 22)
    assert torch.equal(made, GEMM(x, weight, places, owners, 22))
    assert torch.ops.planish.combine_experts(made, weights).shape == (11, 7)
    assert torch.ops.planish.grouped_gemm(*_meta().values()).shape == (16, 48)
    routed = torch.ops.planish.route_experts(torch.empty(11, 5, device="meta"), 2)
    assert [tuple(t.shape) for t in routed] == [(11, 2), (11, 2), (320,), (5,)]
