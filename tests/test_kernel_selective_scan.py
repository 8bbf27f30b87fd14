"""The selective scan: the twin against loops, what is refused, how channels are cut."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planish.kernels import selective_scan as kernel
from planish.kernels.scan_cases import CASES

TWIN = kernel.SPEC.twin


def _normal(*sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sizes, generator=generator, dtype=torch.float64)


def _problem(groups=2):
    return {
        "u": _normal(2, 5, 6, seed=0),
        "delta": _normal(2, 5, 6, seed=1),
        "a": -_normal(6, 3, seed=2).exp(),
        "b": _normal(2, 5, groups, 3, seed=3),
        "c": _normal(2, 5, groups, 3, seed=4),
        "d": _normal(6, seed=5),
        "z": _normal(2, 5, 6, seed=6),
        "delta_bias": _normal(6, seed=7),
        "start": _normal(2, 6, 3, seed=8),
        "softplus": True,
    }


def _loops(u, delta, a, b, c, d, z, delta_bias, start, softplus):
    y, last = torch.zeros_like(u), start.clone()
    each = u.shape[2] // b.shape[2]
    for n in range(u.shape[0]):
        for ch in range(u.shape[2]):
            for t in range(u.shape[1]):
                step = float(delta[n, t, ch] + delta_bias[ch])
                step = math.log1p(math.exp(step)) if softplus else step
                total = float(d[ch] * u[n, t, ch])
                for s in range(a.shape[1]):
                    kept = math.exp(step * float(a[ch, s])) * float(last[n, ch, s])
                    read = b[n, t, ch // each, s], c[n, t, ch // each, s]
                    last[n, ch, s] = kept + step * float(read[0] * u[n, t, ch])
                    total += float(read[1] * last[n, ch, s])
                gate = float(z[n, t, ch])
                y[n, t, ch] = total * gate / (1 + math.exp(-gate))
    return y, last


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("softplus", [True, False])
def test_twin_is_the_definition(groups, softplus):
    args = _problem(groups) | {"softplus": softplus}
    for got, expected in zip(TWIN(**args), _loops(**args), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["d", "z", "delta_bias", "start"])
def test_every_option_does_something(name):
    args = _problem()
    without = TWIN(**(args | {name: None}))[0]
    assert (TWIN(**args)[0] - without).abs().max() > 1e-2


def test_a_scan_goes_on_where_another_stopped():
    args = _problem()
    y, last = TWIN(**args)
    along = ("u", "delta", "b", "c", "z")
    first, middle = TWIN(**(args | {n: args[n][:, :2] for n in along}))
    second, end = TWIN(**(args | {n: args[n][:, 2:] for n in along} | {"start": middle}))
    torch.testing.assert_close(torch.cat((first, second), 1), y, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(end, last, rtol=1e-13, atol=1e-13)


def test_no_tokens_leave_the_start():
    args = _problem()
    y, last = TWIN(**(args | {n: args[n][:, :0] for n in ("u", "delta", "b", "c", "z")}))
    assert y.shape == (2, 0, 6)
    assert torch.equal(last, args["start"])


def _meta(**changes):
    def of(*sizes, dtype=torch.bfloat16):
        return torch.empty(sizes, dtype=dtype, device="meta")

    args = {
        "u": of(2, 5, 96),
        "delta": of(2, 5, 96),
        "a": of(96, 16, dtype=torch.float32),
        "b": of(2, 5, 3, 16),
        "c": of(2, 5, 3, 16),
    }
    return args | {name: make(of) for name, make in changes.items()}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"u": lambda of: of(2, 96, 5).transpose(1, 2)}, None),
        ({"delta": lambda of: of(2, 5, 96, dtype=torch.float64)}, "float64"),
        ({"a": lambda of: of(96, 256)}, None),
        ({"a": lambda of: of(96, 257)}, "257"),
        ({"c": lambda of: of(2, 5, 2, 16)}, "groups"),
        ({"b": lambda of: of(2, 5, 5, 16)}, "groups"),
        ({"b": lambda of: of(2, 5, 16, 3).transpose(2, 3)}, "side by side"),
        ({"d": lambda of: of(192)[::2]}, "contiguous"),
        ({"d": lambda of: of(96)}, None),
        ({"u": lambda of: of(65536, 5, 96)}, "65536"),
    ],
)
def test_why_not(changes, said):
    reason = kernel.why_not("sm_80", **_meta(**changes))
    assert reason is None if said is None else said in reason


def test_every_case_is_one_that_the_kernel_takes():
    for case in CASES:
        args = case.make(torch.Generator().manual_seed(0))
        assert kernel.why_not("sm_90", **args) is None, case.name


@given(
    channels=st.integers(1, 300),
    states=st.sampled_from([1, 12, 16, 64, 128, 256]),
    groups=st.sampled_from([1, 2, 4]),
)
def test_blocks_cover_the_channels_and_share_a_row_only_within_a_group(channels, states, groups):
    channels *= groups
    args = _meta(
        u=lambda of: of(2, 5, channels),
        delta=lambda of: of(2, 5, channels),
        a=lambda of: of(channels, states),
        b=lambda of: of(2, 5, groups, states),
        c=lambda of: of(2, 5, groups, states),
    )
    (launch,) = kernel.plan(**args).launches
    block, each = launch.constants["BC"], channels // groups
    assert launch.grid == (-(-channels // block), 2)
    assert launch.constants["BS"] >= states
    assert block * launch.constants["BS"] <= 1024
    if launch.constants["UNIFORM"]:
        for first in range(0, channels, block):
            last = min(first + block, channels) - 1
            assert first // each == last // each


def test_cost_counts_everything_once():
    cost = kernel.cost(**_meta())
    values = 3 * 2 * 5 * 96 + 2 * 2 * 5 * 3 * 16
    assert cost.nbytes == 2 * values + 4 * 96 * 16 + 4 * 2 * 96 * 16
    assert cost.flops == 7 * 2 * 5 * 96 * 16


def test_operator_runs_the_twin_and_knows_its_shapes():
    args = _problem()
    got = torch.ops.planish.selective_scan(*args.values())
    assert all(torch.equal(x, y) for x, y in zip(got, TWIN(**args), strict=True))
    y, last = torch.ops.planish.selective_scan(*_meta().values())
    assert (y.shape, last.shape, last.dtype) == ((2, 5, 96), (2, 96, 16), torch.float32)
