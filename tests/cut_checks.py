"""What holds of every cut: it equals the program with those weights at 0, in float64."""

from __future__ import annotations

import functools

import torch
import zoo
from captured import captured
from planish.ir.channel_map import ChannelMap
from planish.ir.cut_channels import cut_channels, masked
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.ir.prunable_units import Unit
from planish.recipes import pipeline


@functools.cache
def raised(name: str, attention: zoo.Attention | None = None) -> Program:
    """To be read only."""
    attention = attention or zoo.ARCHITECTURES[name].attentions[0]
    return pipeline("raise").run(captured(name, attention))


def sizes(units: list[Unit]) -> list[int]:
    groups: dict[str, int] = {}
    for unit in units:
        groups[unit.group] = groups.get(unit.group, 0) + 1
    return list(groups.values())


def doubled(program: Program) -> Program:
    """Weights in float64, so that a norm's new factor is not rounded to float32."""
    wide = program.copy()
    for name in list(wide.weights):
        if wide.weights.dtype(name) == torch.float32:
            wide.weights[name] = wide.weights[name].double()
    return wide


def gap(a: Program, b: Program) -> float:
    """The largest difference of float64 runs on the examples of `a`, by the largest result."""
    flat = list(a.examples)
    pairs = zip(run(a, flat, float64=True), run(b, flat, float64=True), strict=True)
    floats = [(x, y) for x, y in pairs if x.is_floating_point()]
    assert all(bool(x.isfinite().all() and y.isfinite().all()) for x, y in floats)
    return max(float((x - y).abs().max() / x.abs().max()) for x, y in floats)


def every_third(units: list[Unit]) -> set[int]:
    """Of each group every third unit: FFN channels, width; of heads the second."""
    places: dict[str, int] = {}
    dead: set[int] = set()
    for unit in units:
        place = places[unit.group] = places.get(unit.group, -1) + 1
        if place % 3 == 1:
            dead |= unit.roots
    return dead


def check(program: Program, channels: ChannelMap, dead: set[int]) -> None:
    """Weights in float64: then sums of at most some hundred terms, through two layers, round to a
    few thousand units of the last place, and a wrong channel shows in the first digits."""
    wide = doubled(program)
    twin = masked(wide, channels, dead)
    made = cut_channels(wide.copy(), dead, channels=channels)
    assert made.parameter_count() < wide.parameter_count()
    limit = 4096 * torch.finfo(torch.float64).eps
    assert gap(twin, made) <= limit
    assert gap(program, made) > 1e-3  # what went mattered
    zeroed = cut_channels(twin.copy(), dead, channels=channels)
    assert gap(twin, zeroed) <= limit
