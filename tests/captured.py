"""Captured programs of the tiny models, one capture a process."""

from __future__ import annotations

import functools

import zoo
from planish.ir.capture import capture_module
from planish.ir.program import Program


@functools.cache
def sample(name: str, attention: zoo.Attention) -> zoo.Sample:
    return zoo.build(name, attention)


@functools.cache
def _captured(name: str, attention: zoo.Attention) -> Program:
    made = sample(name, attention)
    return capture_module(made.model, made.args, made.kwargs)


def captured(name: str, attention: zoo.Attention = "sdpa") -> Program:
    """A private copy of the captured program of a tiny model."""
    return _captured(name, attention).copy()
