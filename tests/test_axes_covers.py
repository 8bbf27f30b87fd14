"""Channels that cover others: what goes when values that share channels meet."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.ir.axes_channels import Channels
from planish.ir.axes_covers import Covers, copies, meet, rows_of, settle
from torch import Tensor


def channel_tensor(draw: st.DrawFn, channels: Channels, shape: list[int]) -> Tensor:
    """Channels of its own, of which some are shared and some are none."""
    own = channels.new(4)
    size = torch.Size(shape).numel()
    picks = draw(st.lists(st.integers(-1, 3), min_size=size, max_size=size))
    return torch.tensor([0 if p < 0 else int(own[p]) for p in picks]).reshape(shape)


@st.composite
def meetings(draw: st.DrawFn) -> tuple[Channels, list[tuple[Tensor, Tensor, Tensor]]]:
    """Some values that meet, the results of which meet others."""
    channels = Channels()
    shapes = [[3, 2], [1, 2], [3, 1], [2]]
    values = [channel_tensor(draw, channels, draw(st.sampled_from(shapes))) for _ in range(3)]
    met: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(draw(st.integers(1, 4))):
        a, b = (values[draw(st.integers(0, len(values) - 1))] for _ in range(2))
        values.append(meet(channels, a, b))
        met.append((*torch.broadcast_tensors(a, b), values[-1]))
    return channels, met


@settings(max_examples=150, deadline=None)
@given(meetings(), st.sets(st.integers(1, 40), max_size=5))
def test_what_goes_goes_at_every_place(
    made: tuple[Channels, list[tuple[Tensor, Tensor, Tensor]]], dead: set[int]
) -> None:
    """At each place of a meeting the result goes if either side does; and a side's channel goes
    if the result goes at all places where it stands."""
    channels, met = made
    classes, covers = settle(channels)
    roots = torch.from_numpy(classes.roots)
    gone = covers.closure(int(roots[number]) for number in dead if number < channels.count)
    assert covers.closure(gone) == gone and 0 not in gone
    for a, b, result in met:
        parts = [
            torch.isin(roots[ids], torch.tensor(sorted(gone or {-1}))) for ids in (a, b, result)
        ]
        assert bool((parts[2] | ~(parts[0] | parts[1])).all())
        for ids, side in ((a, parts[0]), (b, parts[1])):
            for number in set(ids.flatten().tolist()) - {0}:
                places = roots[ids] == roots[number]
                if bool(parts[2][places].all()):
                    assert bool(side[places].all())


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.sets(st.integers(1, 9), min_size=1, max_size=4)),
        max_size=6,
    ),
    st.sets(st.integers(0, 9), max_size=4),
)
def test_closure_is_the_least_fixed_point(
    families: list[tuple[int, set[int]]], dead: set[int]
) -> None:
    wanted = dead - {0}
    while True:
        more = set(wanted)
        for coarse, members in families:
            if members <= wanted:
                more.add(coarse)
            if coarse in wanted:
                more |= members
        if more == wanted:
            break
        wanted = more
    covers = Covers((coarse, tuple(sorted(members))) for coarse, members in families)
    assert covers.closure(dead) == wanted


def test_a_norm_that_heads_share_goes_with_the_last_of_them() -> None:
    channels = Channels()
    heads, norm = channels.new(6).reshape(3, 2), channels.new(2)
    met = meet(channels, heads, norm)
    classes, covers = settle(channels)
    assert torch.equal(met, heads) and len(set(classes.roots.tolist())) == channels.count
    assert covers.closure([1, 3]) == {1, 3}
    assert covers.closure([1, 3, 5]) == {1, 3, 5, int(norm[0])}
    assert covers.closure([int(norm[1])]) == {2, 4, 6, int(norm[1])}


def test_what_meets_one_to_one_is_one() -> None:
    channels = Channels()
    a, b = channels.new(3), channels.new(3)
    meet(channels, a, b)
    classes, covers = settle(channels)
    assert (classes.roots[a.numpy()] == classes.roots[b.numpy()]).all() and not covers.families


def test_states_go_with_their_channel_or_their_place() -> None:
    """As in Mamba: [channels, 1] meets [1, states]; a sum over states is the channel again."""
    channels = Channels()
    inner, states = channels.new(2).reshape(2, 1), channels.new(3)
    pairs = meet(channels, inner, states)
    assert torch.equal(rows_of(channels, pairs), inner.flatten())
    _, covers = settle(channels)
    assert covers.closure([1]) == {1, *pairs[0].tolist()}
    assert covers.closure(pairs[:, 2].tolist()) == {int(states[2]), *pairs[:, 2].tolist()}


def test_copies_go_alone_but_the_last_one_takes_all() -> None:
    channels = Channels()
    one = channels.new(2).reshape(1, 2)
    several = copies(channels, one.expand(3, 2), 0, torch.arange(3))
    _, covers = settle(channels)
    assert covers.closure(several[:2, 0].tolist()) == set(several[:2, 0].tolist())
    assert covers.closure(several[:, 0].tolist()) == {1, *several[:, 0].tolist()}
