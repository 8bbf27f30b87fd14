"""A decoder over a cached program: the reference interpreter, or any callable that runs it.

The cache is the program's own `past`: the keys and values that the last call returned. Going back
is a shorter view of them, and keeping a branch of a tree is a selection of their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .ir.errors import PlanishError, TextTooLong, WrongInput
from .ir.interpret import run as interpret
from .ir.program import Program
from .passes.add_tree_mask import TREE_MASK, TREE_POSITIONS
from .passes.insert_kv_cache import empty_past

Run = Callable[[Sequence[Any]], Sequence[Any]]
PADDING_MASK = "attention_mask"


class NotADecoder(PlanishError):
    """A program that has no KV cache, or inputs that a decoder cannot fill."""


class ProgramDecoder:
    """One text under way in a program that has a KV cache; a `Decoder`.

    After the pass add_tree_mask it is a `TreeDecoder` too. run: computes the flat outputs of flat
    inputs (default: the reference interpreter). extra: what the last call returned besides the
    logits and the cache, [tokens, ...] each, the rows of those that were not taken back.
    Raises NotADecoder.
    """

    def __init__(self, program: Program, run: Run | None = None) -> None:
        self.program = program
        self._run = run or partial(interpret, program)
        self._inputs = _check_inputs(program)
        self._past: list[Tensor] = empty_past(program, 1)
        self._begin, self._length = 0, 0
        self.extra: list[Tensor] = []
        self.vocabulary = int(program.results[0].meta["val"].shape[-1])
        cache = program.metadata.get("cache")
        self.context: int | None = cache.get("context") if isinstance(cache, dict) else None

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._length

    def advance(self, tokens: Sequence[int], last: int | None = None) -> Tensor:
        """Append tokens; logits [min(last, len(tokens)), vocabulary] float32 of the last ones.

        Raises TextTooLong, and WrongInput for no tokens, unknown ones, or more rows than the
        program returns.
        """
        count = len(tokens)
        chain = torch.ones(count, count, dtype=torch.bool).tril()
        return self._call(tokens, chain, torch.arange(count), last)

    def advance_tree(self, tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
        """Logits [len(tokens), vocabulary] of a tree of tokens; see `TreeDecoder`.

        Until `keep_branch`, the whole tree counts as text. Raises NotADecoder where the program
        has no tree mask, and what `advance` raises.
        """
        if TREE_MASK not in self._inputs:
            raise NotADecoder(
                "the program cannot look at a tree of tokens",
                expected=f"an input {TREE_MASK}",
                found=f"the inputs {', '.join(n for n in self._inputs if not _is_past(n))}",
                fix="run the pass add_tree_mask after insert_kv_cache",
            )
        return self._call(tokens, *tree_mask(parents), None)

    def keep_branch(self, path: Sequence[int]) -> None:
        """Of the tree just added keep only the tokens `path` (root first) in the cache."""
        begin = self._begin
        chosen = torch.tensor([*range(begin), *(begin + i for i in path)], dtype=torch.int64)
        self._past = [kept.index_select(2, chosen) for kept in self._past]
        self.extra = [value[list(path)] for value in self.extra]
        self._length = len(chosen)

    def rewind(self, length: int) -> None:
        """Forget everything after the first `length` tokens; raises WrongInput."""
        if not 0 <= length <= self._length:
            raise WrongInput(
                "a text can only be rewound to a beginning of itself",
                expected=f"0 to {self._length} tokens",
                found=str(length),
            )
        cache = self.program.metadata.get("cache")
        goes_back = cache.get("rewind", True) if isinstance(cache, dict) else True
        if not goes_back and length < self._length:
            raise NotADecoder(
                "the cache of this program cannot go back: it drops or merges what it held",
                expected=f"to keep all {self._length} tokens",
                found=f"a rewind to {length}",
                fix="decode without drafts, or leave the cache policy out of the recipe",
            )
        self._past = [kept[:, :, :length] for kept in self._past]
        self.extra = [v[: max(0, len(v) - self._length + length)] for v in self.extra]
        self._length = length

    def _call(
        self, tokens: Sequence[int], mask: Tensor, depths: Tensor, last: int | None
    ) -> Tensor:
        self._check_tokens(tokens)
        total = self._length + len(tokens)
        past = iter(self._past)
        given: dict[str, Tensor] = {
            TREE_MASK: mask,
            TREE_POSITIONS: depths,
            PADDING_MASK: torch.ones(1, total, dtype=torch.int64),
        }
        ids = torch.tensor([list(tokens)], dtype=torch.int64)
        flat = [next(past) if _is_past(n) else given.get(n, ids) for n in self._inputs]
        logits, *rest = self._run(flat)
        wanted = len(tokens) if last is None else min(last, len(tokens))
        if logits.shape[1] < wanted:
            raise WrongInput(
                "the program returns the logits of the last tokens only",
                expected=f"{wanted} rows",
                found=f"{logits.shape[1]} rows",
                fix="pass fewer tokens, or keep more logits in the recipe",
            )
        present = len(rest) - len(self._past)
        self.extra, self._past = [value[0] for value in rest[:present]], rest[present:]
        self._begin, self._length = self._length, total
        return logits[0, logits.shape[1] - wanted :].float()

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        total = self._length + len(tokens)
        if not tokens or not 0 <= min(tokens) <= max(tokens) < self.vocabulary:
            raise WrongInput(
                "these are no tokens of the model",
                expected=f"one or more numbers from 0 to {self.vocabulary - 1}",
                found=f"{min(tokens)} to {max(tokens)}" if tokens else "none",
                fix="use the tokenizer that belongs to the model",
            )
        if self.context is not None and total > self.context:
            raise TextTooLong(
                "the text does not fit into the model's context",
                expected=f"at most {self.context} tokens",
                found=f"{self._length} tokens and {len(tokens)} more",
                fix="shorten the prompt, or ask for fewer new tokens",
            )


def tree_mask(parents: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Who sees whom in a tree: mask bool[n, n] (row i: i and its ancestors), depths int64[n]."""
    mask = torch.eye(len(parents), dtype=torch.bool)
    depths = torch.zeros(len(parents), dtype=torch.int64)
    for token, parent in enumerate(parents):
        if not -1 <= parent < token:
            raise WrongInput(
                "a tree's tokens must come after their parents",
                expected=f"the parent of token {token} to be from -1 to {token - 1}",
                found=str(parent),
            )
        if parent >= 0:
            mask[token] |= mask[parent]
            depths[token] = depths[parent] + 1
    return mask, depths


def _is_past(name: str) -> bool:
    return name.startswith(("past_key_", "past_value_"))


def _check_inputs(program: Program) -> list[str]:
    """The inputs by name: one of token ids, the cache's, and masks."""
    names = [node.name for node in program.inputs]
    known = {TREE_MASK, TREE_POSITIONS, PADDING_MASK}
    others = [name for name in names if not _is_past(name) and name not in known]
    cache = program.metadata.get("cache")
    form = cache.get("form", "growing") if isinstance(cache, dict) else "growing"
    if "cached" not in program.facts or len(others) != 1 or form != "growing":
        raise NotADecoder(
            "the program cannot decode token by token",
            expected="token ids as its only input besides masks and a growing KV cache",
            found=f"the inputs {', '.join(names)}; a cache that is {form}",
            fix="capture from token ids alone and run insert_kv_cache",
        )
    return names
