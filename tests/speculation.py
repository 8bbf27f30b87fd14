"""Tiny random decoders for the tests of speculation, as cached programs."""

from __future__ import annotations

import functools

import torch
import zoo
from captured import _version
from filelock import FileLock
from planish.decode_program import ProgramDecoder
from planish.decoder import Decoder
from planish.ir.capture import capture_module
from planish.ir.program import Program
from planish.ir.program_folder import is_program_folder, load_program, save_program
from planish.ir.read_gguf import cache_folder
from planish.passes.add_tree_mask import AddTreeMask
from planish.passes.insert_kv_cache import InsertKvCache
from planish.passes.pipeline import Pipeline
from planish.recipes import pipeline
from planish.sampling import Sampling

DECODERS: list[tuple[str, zoo.Attention]] = [
    ("llama", "sdpa"),
    ("gemma2", "eager"),  # windows, soft caps
    ("gpt2", "sdpa"),  # a table of positions
]


@functools.cache
def raised(name: str, attention: zoo.Attention = "sdpa", layers: int = 2) -> Program:
    """A tiny model with its layers, captured from token ids alone, kept in planish's cache."""
    many = "" if layers == 2 else f"-{layers}"
    folder = cache_folder() / f"tests-{_version()}" / f"{name}-{attention}-ids{many}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not is_program_folder(folder):
            made = zoo.build(name, attention, layers=layers)
            program = capture_module(made.model, (), {"input_ids": made.kwargs["input_ids"]})
            save_program(program, folder, overwrite=True)
    return pipeline("raise").run(load_program(folder))


@functools.cache
def cached(name: str, attention: zoo.Attention = "sdpa", layers: int = 2) -> Program:
    return Pipeline([InsertKvCache()]).run(raised(name, attention, layers))


@functools.cache
def branching(name: str, attention: zoo.Attention = "sdpa", layers: int = 2) -> Program:
    return Pipeline([AddTreeMask()]).run(cached(name, attention, layers))


@functools.cache
def plain_text(
    name: str, attention: zoo.Attention, ids: tuple[int, ...], count: int, sampling: Sampling
) -> tuple[int, ...]:
    """Token by token, without drafts."""
    decoder: Decoder = ProgramDecoder(cached(name, attention))
    text, chance = list(ids), sampling.generator()
    row = decoder.advance(text, last=1)[-1]
    for _ in range(count):
        text.append(sampling.choose(row, text, chance))
        row = decoder.advance(text[-1:], last=1)[-1]
    return tuple(text[len(ids) :])


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, zoo.VOCABULARY, (length,), generator=generator).tolist())
