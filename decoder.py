"""What generation asks of a decoder: take tokens, keep a cache, forget the last ones again.

Every way to run a cached program (the reference interpreter, onnxruntime, compiled PyTorch)
is one small class with this interface; sampling, speculation and `Generator` know nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Decoder(Protocol):
    """One text (batch 1) under way."""

    @property
    def vocabulary(self) -> int:
        """How many tokens the logits tell apart."""
        ...

    @property
    def context(self) -> int | None:
        """The most tokens that a text may have; None where nothing limits it."""
        ...

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        ...

    def advance(self, tokens: Sequence[int], last: int | None = None) -> Tensor:
        """Append tokens; logits [min(last, len(tokens)), vocabulary] float32 of the last ones.

        last: how many rows are wanted (None: all). Raises TextTooLong before anything is changed.
        """
        ...

    def rewind(self, length: int) -> None:
        """Forget everything after the first `length` tokens (0 <= length <= self.length)."""
        ...


class TreeDecoder(Decoder, Protocol):
    """A decoder that can look at several continuations in one call."""

    def advance_tree(self, tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
        """Logits [len(tokens), vocabulary] of a tree of tokens appended to the text.

        parents[i] < i is the token's parent in the tree, or -1 for a child of the text's last
        token. A token sees the text and its own ancestors; its position is its depth.
        """
        ...

    def keep_branch(self, path: Sequence[int]) -> None:
        """Of the tree just added keep only the tokens `path` (root first) in the cache."""
        ...
