"""Tiny decoders captured from token ids alone, raised, and given a KV cache."""

from __future__ import annotations

import functools

import torch
import zoo
from captured import _version, sample
from filelock import FileLock
from planish.ir.capture import capture_module
from planish.ir.program import Program
from planish.ir.program_folder import is_program_folder, load_program, save_program
from planish.ir.read_gguf import cache_folder
from planish.passes.contract import Pass
from planish.passes.insert_kv_cache import InsertKvCache
from planish.passes.pipeline import Pipeline
from planish.recipes import pipeline
from torch import Tensor


def _captured(name: str, attention: zoo.Attention) -> Program:
    folder = cache_folder() / f"tests-{_version()}" / f"{name}-{attention}-ids"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not is_program_folder(folder):
            made = sample(name, attention)
            program = capture_module(made.model, (), {"input_ids": made.kwargs["input_ids"]})
            save_program(program, folder, overwrite=True)
    return load_program(folder)


@functools.cache
def raised(name: str, attention: zoo.Attention = "sdpa") -> Program:
    return pipeline("raise").run(_captured(name, attention))


@functools.cache
def cached(name: str, attention: zoo.Attention = "sdpa") -> Program:
    return Pipeline([InsertKvCache()]).run(raised(name, attention))


@functools.cache
def with_cache(name: str, attention: zoo.Attention, *steps: Pass) -> Program:
    """The cached program after more passes."""
    return Pipeline(list(steps), verify="numbers", on_break="raise").run(cached(name, attention))


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, zoo.VOCABULARY, (batch, length), generator=generator)


def gap(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||"""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())
