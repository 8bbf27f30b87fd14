"""A decoding plan: what a cached program computes for new tokens, as a flat list of steps.

Native steps are records for `planish.kernels.plan_cpu`; the others call torch. A plan is lowered
once (lower_decode.py) and bound to buffers for some number of tokens here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_aggregate

from ..kernels.attention_decode import LANES
from ..kernels.plan_cpu import CallRecord, Kind, StepRecord, record, run_steps
from .decode_places import Place

_FLOAT = 4  # bytes
_ATEN = torch.ops.aten
COUNTS = {_ATEN.arange.default, _ATEN.arange.start, _ATEN.arange.start_step}
"""Operations that number the tokens."""


@dataclass(frozen=True)
class Size:
    """A number that depends on the call: a function of (tokens, past). past: on the latter too."""

    of: Callable[[int, int], int]
    past: bool


@dataclass(frozen=True)
class Slot:
    """A value that torch computed; axis: that of the tokens, if it has one."""

    index: int
    axis: int | None


@dataclass(frozen=True)
class Native:
    """A step in C. inputs: places, constant tensors or None."""

    kind: Kind
    inputs: tuple[Place | Tensor | None, ...]
    out: Place | None
    size: tuple[int, ...]
    number: tuple[float, ...] = ()


@dataclass(frozen=True)
class Called:
    """A step in torch: call(*args, **kwargs) fills a slot, or a place that an operand names."""

    call: Callable[..., Any]
    args: Any
    kwargs: Any
    out: int | None


Step = Native | Called


@dataclass
class Plan:
    """Steps of a program for new tokens.

    buffers: floats a token and the step after whose end each may be used again; result: where the
    logits are; tail: from this step on, each token is computed on its own (or None).
    """

    steps: list[Step] = field(default_factory=list[Step])
    buffers: list[int] = field(default_factory=list[int])
    last_use: list[int] = field(default_factory=list[int])
    slots: int = 1
    result: Place | Slot | None = None
    tail: int = 0


def arrange(plan: Plan) -> tuple[list[int], int]:
    """Where each buffer begins, in floats a token, and how many floats a token there are.

    Buffers whose uses do not overlap share their room: first fit in the order of first use.
    """
    first_use = [len(plan.steps)] * len(plan.buffers)
    for index, step in enumerate(plan.steps):
        for place in _places(step):
            first_use[place.buffer] = min(first_use[place.buffer], index)
    order = sorted(range(len(plan.buffers)), key=lambda b: (first_use[b], b))
    begins, taken, total = [0] * len(plan.buffers), list[tuple[int, int, int]](), 0
    for buffer in order:
        taken = [entry for entry in taken if entry[2] >= first_use[buffer]]
        width, at = -(-plan.buffers[buffer] // 16) * 16, 0
        for begin, end, _ in sorted(taken):
            if begin - at >= width:
                break
            at = max(at, end)
        begins[buffer] = at
        taken.append((at, at + width, plan.last_use[buffer]))
        total = max(total, at + width)
    return begins, total


def _places(step: Step) -> list[Place]:
    found: list[Place] = []
    if isinstance(step, Native):
        found += [place for place in (*step.inputs, step.out) if isinstance(place, Place)]
    else:
        map_aggregate(
            (step.args, step.kwargs), lambda a: found.append(a) if isinstance(a, Place) else None
        )
    return found


@dataclass
class Caches:
    """Keys and values of every layer: one set of buffers for all plans of a decoder."""

    buffers: list[Tensor]
    capacity: int
    addresses: Any = None

    def keep(self, past: int, path: Sequence[int]) -> None:
        """Of the tokens after `past` keep those of `path`, in its order, right behind it."""
        old, new = torch.tensor(path) + past, torch.arange(len(path)) + past
        for keys, values in zip(self.buffers[::2], self.buffers[1::2], strict=True):
            keys[:, new // LANES, :, new % LANES] = keys[:, old // LANES, :, old % LANES]
            values[:, new] = values[:, old]

    def __post_init__(self) -> None:
        kept = [buffer.data_ptr() for buffer in self.buffers]
        self.addresses = (ctypes.c_void_p * max(1, len(kept)))(*kept)


@dataclass(frozen=True)
class Tree:
    """Tokens of which each sees its own ancestors only. depth: int64 [tokens], the distance from
    the end of the text; mask: float32 [tokens, tokens], minus infinity where a token is not seen.
    """

    depth: Tensor
    mask: Tensor

    @classmethod
    def of(cls, parents: Sequence[int]) -> Tree:
        """parents[i] < i, or -1 for a child of the text's last token."""
        seen = torch.eye(len(parents), dtype=torch.bool)
        depth: list[int] = []
        for place, parent in enumerate(parents):
            depth.append(depth[parent] + 1 if parent >= 0 else 0)
            if parent >= 0:
                seen[place] |= seen[parent]
        mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
        return cls(torch.tensor(depth), mask)


class BoundPlan:
    """A plan with buffers for up to `room` tokens a call."""

    def __init__(self, plan: Plan, room: int) -> None:
        self.plan, self.room = plan, room
        begins, width = arrange(plan)
        self._memory = torch.zeros(width * room + 16)
        self._begins = [begin * room for begin in begins]
        self._slots: list[Any] = [None] * plan.slots
        self._runs = self._bound_runs()
        self._call = CallRecord()
        self._tree: Tree | None = None

    def _bound_runs(self) -> list[tuple[int, Any]]:
        """(first step, records or the one torch step): neighbouring native steps go together."""
        runs: list[tuple[int, Any]] = []
        pending: list[StepRecord] = []
        steps = self.plan.steps
        for index, step in enumerate(steps):
            if isinstance(step, Native):
                pending.append(self._record(step))
            ends = not isinstance(step, Native) or index + 1 in (len(steps), self.plan.tail)
            if ends and pending:
                records = (StepRecord * len(pending))(*pending)
                start = index + 1 - len(pending) - (not isinstance(step, Native))
                runs.append((start, records))
                pending = []
            if isinstance(step, Called):
                runs.append((index, step))
        return runs

    def _record(self, step: Native) -> StepRecord:
        inputs = [self._address(operand) for operand in step.inputs]
        out = 0 if step.out is None else self._address(step.out)
        return record(step.kind, inputs, out or 0, step.size, step.number)

    def _address(self, operand: Place | Tensor | None) -> int | None:
        if operand is None:
            return None
        if isinstance(operand, Tensor):
            return operand.data_ptr()
        return self._memory.data_ptr() + _FLOAT * (self._begins[operand.buffer] + operand.offset)

    def run(
        self, ids: Tensor, past: int, last: int, caches: Caches, threads: int,
        tree: Tree | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits [last or more, vocabulary] of `ids` [1, tokens] at `past`; fills the caches.

        tree: the tokens are nodes of one; all rows are then given.
        """
        tokens = ids.shape[1]
        assert tokens <= self.room and past + tokens <= caches.capacity
        self._slots[0] = ids
        call = self._call
        call.past, call.capacity, call.all = past, caches.capacity, tokens
        call.caches = ctypes.addressof(caches.addresses)
        call.mask = None if tree is None else tree.mask.data_ptr()
        call.depth = None if tree is None else tree.depth.data_ptr()
        self._tree = tree
        first = 0
        for start, work in self._runs:
            if start == self.plan.tail:
                first = tokens - last
            if isinstance(work, Called):
                self._call_torch(work, start, first, tokens, past)
            else:
                call.first, call.tokens = first, tokens - first
                run_steps(work, len(work), call, threads)
        return self._result(first, tokens - first)

    def _call_torch(self, step: Called, index: int, first: int, tokens: int, past: int) -> None:
        count = tokens - first

        def filled(argument: Any) -> Any:
            if isinstance(argument, Place):
                return self._view(argument, first, count)
            if isinstance(argument, Size):
                return argument.of(count, past)
            if isinstance(argument, Slot):
                value = self._slots[argument.index]
                if first and argument.axis is not None and value.shape[argument.axis] == tokens:
                    return value.narrow(argument.axis, first, count)
                return value
            return argument

        result = step.call(*map_aggregate(step.args, filled), **map_aggregate(step.kwargs, filled))
        if self._tree is not None and step.call in COUNTS and result.shape == (tokens,):
            result = result[0] + self._tree.depth.to(result.dtype)
        if step.out is not None:
            self._slots[step.out] = result

    def _view(self, place: Place, first: int, count: int) -> Tensor:
        begin = self._begins[place.buffer] + place.offset + first * place.token_stride
        return torch.as_strided(self._memory, place.sizes(count), place.strides, begin)

    def _result(self, first: int, count: int) -> Tensor:
        result = self.plan.result
        assert result is not None
        value = (
            self._view(result, first, count)
            if isinstance(result, Place)
            else self._slots[result.index]
        )
        return value.flatten(0, -2).clone()
