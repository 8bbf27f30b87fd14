"""A decoder on the CPU: the steps of a cached program in C, its cache kept in place.

    decoder = TorchDecoder(program)          # program: with a KV cache (insert_kv_cache)
    logits = decoder.advance(prompt, last=1)
    logits = decoder.advance([int(logits[-1].argmax())])

Nothing is compiled when a decoder is made, but for the C kernels on the first use on a machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .codegen.decode_plan import BoundPlan, Caches, Tree
from .codegen.decode_sizes import CannotDecode, Layer, layers_of, most_rows
from .codegen.lower_cpu import pack_weights
from .codegen.lower_decode import lower_plan
from .ir.errors import TextTooLong, WrongInput, WrongOption
from .ir.program import Program
from .kernels.plan_cpu import KEY_BLOCK, why_not

ACTIVATIONS = ("float32", "int8")
FEW = 8
"""Tokens that are decoded at once with every weight read once."""
ROOM = 192
"""Tokens of a prompt that are computed at once."""


class TorchDecoder:
    """One text (batch 1) under way; a `TreeDecoder`.

    activations: "float32", or "int8" to compute a prompt faster: in packed products of more than
    eight tokens at once, activations are rounded to 8 bits by blocks of at most 64 channels, where
    the processor has products of bytes (AVX512 VNNI). Decoding is not changed by it.
    Raises CannotDecode for a program without a cache, or one that does not compute in float32, and
    WrongOption.
    """

    draft_tokens = 5
    """Drafts that pay: six tokens take about two times as long as one (two threads, 4-bit)."""

    def __init__(self, program: Program, activations: str = "float32") -> None:
        if activations not in ACTIVATIONS:
            raise WrongOption(
                f"activations cannot be {activations!r}",
                expected=" or ".join(ACTIVATIONS),
                found=repr(activations),
                fix='leave it out for "float32"',
            )
        if reason := why_not():
            raise CannotDecode("decoding needs its C kernels", found=reason, fix="install gcc")
        packed, self.choices = pack_weights(program)
        self._program, self._rounded = packed, activations == "int8"
        self._layers = layers_of(packed)
        self._few = BoundPlan(lower_plan(packed, few=True), FEW)
        self._many: BoundPlan | None = None
        self._caches = _empty(self._layers, KEY_BLOCK)
        self._length = self._tree = 0
        self._most = most_rows(packed)
        self.vocabulary = int(program.results[0].meta["val"].shape[-1])
        cache = program.metadata.get("cache")
        self.context: int | None = cache.get("context") if isinstance(cache, dict) else None

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._length

    def advance(self, tokens: Sequence[int], last: int | None = None) -> Tensor:
        """Append tokens; logits [min(last, len(tokens)), vocabulary] float32 of the last ones.

        Raises TextTooLong, and WrongInput for no tokens or unknown ones.
        """
        self._check(tokens)
        wanted = len(tokens) if last is None else min(last, len(tokens))
        self._reserve(self._length + len(tokens))
        parts = self._parts(len(tokens), wanted)
        rows = [self._part(tokens[start:end], count) for start, end, count in parts]
        rows = [part for part, (_, _, count) in zip(rows, parts, strict=True) if count]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _parts(self, tokens: int, wanted: int) -> list[tuple[int, int, int]]:
        """(start, end, rows of logits wanted) of what is computed at once."""
        silent = tokens - wanted
        few = self._most is not None and wanted > self._most
        bounds = list(range(0, silent if few else tokens, ROOM))
        bounds += range(silent, tokens, self._most) if few and self._most else []
        pairs = zip(bounds, [*bounds[1:], tokens], strict=True)
        return [(a, b, min(max(b - silent, 0), b - a)) for a, b in pairs]

    def _part(self, tokens: Sequence[int], count: int) -> Tensor:
        ids = torch.tensor([tokens], dtype=torch.int64)
        run = self._plan(len(tokens)).run
        threads = torch.get_num_threads()
        logits = run(ids, self._length, max(count, 1), self._caches, threads)
        self._length += len(tokens)
        self._tree = 0
        return logits[-max(count, 1) :]

    def advance_tree(self, tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
        """Logits [len(tokens), vocabulary] of a tree of tokens appended to the text.

        parents[i] < i is the token's parent in the tree, or -1 for a child of the text's last
        token. A token sees the text and its own ancestors; its position is its depth. Raises
        TextTooLong and WrongInput.
        """
        self._check(tokens)
        wrong = [i for i, parent in enumerate(parents) if not -1 <= parent < i]
        if wrong or len(parents) != len(tokens) or len(tokens) > (self._most or ROOM):
            raise WrongInput(
                "this is no tree of tokens",
                expected=f"at most {self._most or ROOM} tokens, each after its parent",
                found=f"{len(tokens)} tokens with parents {list(parents)}",
            )
        self._reserve(self._length + len(tokens))
        ids = torch.tensor([tokens], dtype=torch.int64)
        run, threads = self._plan(len(tokens)).run, torch.get_num_threads()
        tree = Tree.of(parents)
        logits = run(ids, self._length, len(tokens), self._caches, threads, tree)
        self._length += len(tokens)
        self._tree = len(tokens)
        return logits

    def keep_branch(self, path: Sequence[int]) -> None:
        """Of the tree just added keep only the tokens `path` (root first) in the cache."""
        if any(not 0 <= token < self._tree for token in path):
            raise WrongInput(
                "the branch is not of the tree that was just added",
                expected=f"numbers from 0 to {self._tree - 1}" if self._tree else "no tokens",
                found=str(list(path)),
            )
        self._length -= self._tree
        self._caches.keep(self._length, path)
        self._length += len(path)
        self._tree = 0

    def rewind(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        if not 0 <= length <= self._length:
            raise WrongInput(
                "a text can only become shorter",
                expected=f"0 to {self._length} tokens",
                found=str(length),
            )
        self._length, self._tree = length, 0

    def _plan(self, tokens: int) -> BoundPlan:
        if tokens <= FEW:
            return self._few
        if self._many is None:
            self._many = BoundPlan(
                lower_plan(self._program, few=False, rounded=self._rounded), ROOM
            )
        return self._many

    def _check(self, tokens: Sequence[int]) -> None:
        if self.context is not None and self._length + len(tokens) > self.context:
            raise TextTooLong(
                "the text would be longer than the model's context",
                expected=f"at most {self.context} tokens",
                found=f"{self._length} in the cache and {len(tokens)} new ones",
                fix="shorten the text or rewind",
            )
        unknown = [token for token in tokens if not 0 <= token < self.vocabulary]
        if unknown or not tokens:
            raise WrongInput(
                "the tokens are not of this vocabulary" if unknown else "there are no tokens",
                expected=f"at least one number from 0 to {self.vocabulary - 1}",
                found=str(unknown[0]) if unknown else "none",
            )

    def _reserve(self, length: int) -> None:
        """Room for a text of `length` tokens: buffers double, what they hold is kept."""
        held = self._caches.capacity
        if length <= held:
            return
        grown = _empty(self._layers, -(-max(length, 2 * held) // KEY_BLOCK) * KEY_BLOCK)
        for old, new in zip(self._caches.buffers, grown.buffers, strict=True):
            new[:, : old.shape[1]].copy_(old)
        self._caches = grown


def _empty(layers: Sequence[Layer], capacity: int) -> Caches:
    buffers: list[Tensor] = []
    for layer in layers:
        buffers.append(torch.zeros(layer.kv_heads, capacity // 16, layer.head, 16))
        width = -(-layer.value_head // 16) * 16
        buffers.append(torch.zeros(layer.kv_heads, capacity, width))
    return Caches(buffers, capacity)
