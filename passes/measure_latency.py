"""How long a program takes on this machine, beside another one, in the same minutes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..ir.graph_module import graph_module
from ..ir.program import Program

_ROUNDS = 3
_ENOUGH = 1.0
"""Seconds of one program that a median is of, at least: short calls get more rounds."""
_MOST_ROUNDS = 300


class Latency:
    """Times programs against one original, on the same flat inputs, eagerly in their own dtypes.

    The two run in turn, after one round that is not counted; medians are compared. With one thread
    the thread's own time is taken, which other processes do not lengthen.
    """

    def __init__(self, original: Program, call: Sequence[Any]) -> None:
        self._call = list(call)
        self._original = graph_module(original)
        self._alone = torch.get_num_threads() == 1

    def share(self, program: Program) -> float:
        """The program's median time, of the original's."""
        other = graph_module(program)
        ours, theirs = list[float](), list[float]()
        with torch.no_grad():
            for each in (self._original, other):
                self._seconds(each)
            while len(ours) < _MOST_ROUNDS and (len(ours) < _ROUNDS or sum(ours) < _ENOUGH):
                theirs.append(self._seconds(self._original))
                ours.append(self._seconds(other))
        return statistics.median(ours) / max(statistics.median(theirs), 1e-12)

    @property
    def told(self) -> str:
        """What is measured, for people."""
        clock = "processor time" if self._alone else "wall time"
        threads = torch.get_num_threads()
        return f"median {clock} of the example call, run eagerly on {threads} thread(s)"

    def _seconds(self, run: Callable[..., Any]) -> float:
        clock = time.thread_time if self._alone else time.perf_counter
        begun = clock()
        run(*self._call)
        return clock() - begun


__all__ = ["Latency"]
