"""Medusa heads as drafter, and their fitting on calibration text (Cai et al. 2024, "Medusa").

The heads are part of the decoder's program (pass add_medusa_heads), so a draft costs nothing but
the heads: each call that checks a tree also gives what the next tree is made of. Verification is
that of `speculative`, which is lossless; the paper's typical acceptance is not used.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from .decode_program import NotADecoder, ProgramDecoder
from .ir.errors import WrongInput
from .ir.interpret import run
from .ir.pattern import bound_arguments
from .ir.program import Program
from .ir.write_safetensors import planned, write_safetensors
from .passes.add_medusa_heads import empty_heads, language_head
from .passes.insert_kv_cache import empty_past
from .speculate import Draft

Choices = Sequence[tuple[int, ...]]


def full_tree(widths: Sequence[int]) -> list[tuple[int, ...]]:
    """Every path that takes the likeliest `widths[d]` tokens of head d, parents first."""
    level: list[tuple[int, ...]] = [()]
    paths: list[tuple[int, ...]] = []
    for width in widths:
        level = [(*path, rank) for path in level for rank in range(width)]
        paths += level
    return paths


def likely_tree(accuracies: Tensor, size: int) -> list[tuple[int, ...]]:
    """The `size` paths that are likeliest to be accepted, parents first (Medusa, sec. 2.3.3).

    accuracies [heads, ranks]: how often the token of that rank of that head is right. A path is
    right if all its tokens are, which counts as independent.
    """
    table: list[list[float]] = accuracies.tolist()
    paths: list[tuple[int, ...]] = []
    open_paths: list[tuple[float, tuple[int, ...]]] = [(-table[0][0], (0,))]
    while open_paths and len(paths) < size:
        negative, path = heapq.heappop(open_paths)
        paths.append(path)
        depth, rank = len(path), path[-1]
        row = table[depth - 1]
        if rank + 1 < len(row) and row[rank] > 0:
            chance = negative / row[rank] * row[rank + 1]
            heapq.heappush(open_paths, (chance, (*path[:-1], rank + 1)))
        if depth < len(table):
            heapq.heappush(open_paths, (negative * table[depth][0], (*path, 0)))
    return paths


class MedusaDrafter:
    """Proposes the tree of the heads' likeliest tokens that the decoder's last call computed.

    choices: paths of ranks, (2, 0) being the likeliest token of head 1 after the third of head 0;
    see `full_tree` and `likely_tree`. Raises NotADecoder where the program has no heads.
    """

    def __init__(self, decoder: ProgramDecoder, choices: Choices | None = None) -> None:
        heads = decoder.program.metadata.get("medusa_heads")
        if not isinstance(heads, int):
            raise NotADecoder(
                "the program has no Medusa heads",
                expected="the heads' guesses beside the logits",
                found="logits and a cache only",
                fix="run the pass add_medusa_heads before or after insert_kv_cache",
            )
        widths = (4, 2, *(1 for _ in range(heads)))[:heads]
        self.decoder = decoder
        self.choices = sorted(full_tree(widths) if choices is None else choices, key=len)
        self._most = 1 + max((max(path) for path in self.choices), default=0)

    def propose(self, context: Sequence[int], count: int) -> Draft:
        """The paths of at most `count` tokens."""
        rows = next((value for value in self.decoder.extra if value.dim() == 3), None)
        if rows is None or not len(rows):
            return Draft()
        likeliest: list[list[int]] = rows[-1].topk(min(self._most, rows.shape[-1])).indices.tolist()
        places: dict[tuple[int, ...], int] = {(): -1}
        tokens: list[int] = []
        parents: list[int] = []
        for path in self.choices:
            if len(path) > min(count, len(likeliest)) or path[:-1] not in places:
                continue
            places[path] = len(tokens)
            tokens.append(likeliest[len(path) - 1][path[-1]])
            parents.append(places[path[:-1]])
        return Draft(tokens, parents)


@dataclass(frozen=True)
class FittedHeads:
    """Weights for `add_medusa_heads`, and how often they are right on text they were not fitted on.

    accuracies [heads, ranks]: the share of places where the token of that rank is the right one.
    """

    weights: dict[str, Tensor]
    accuracies: Tensor

    def save(self, path: str | Path) -> Path:
        """Write the weights as a safetensors file, the `path` of add_medusa_heads."""
        write_safetensors(Path(path), {n: planned(value) for n, value in self.weights.items()})
        return Path(path)


def fit_heads(
    program: Program,
    texts: Iterable[Tensor],
    heads: int = 3,
    *,
    epochs: int = 8,
    batch: int = 256,
    learning_rate: float = 1e-3,
    ranks: int = 10,
    held_out: float = 0.1,
    seed: int = 0,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> FittedHeads:
    """Fit one residual block for each head on calibration text, the decoder frozen (Medusa-1).

    program: the decoder, with a cache or without. texts: token ids int64 [rows, length] each, text
    of the kind that will be generated, best the model's own. Head k learns the token two and k
    places on; all heads share the decoder's own output matrix. Raises WrongInput for too little
    text and CannotGraft for a decoder without a linear head.
    """
    states, following, output = _states(program, texts, heads)
    count = len(states)
    kept = count - max(1, round(count * held_out))
    if kept < 1:
        raise WrongInput(
            "there is too little text to fit heads on",
            expected=f"texts longer than {heads + 2} tokens, two places or more in all",
            found=f"{count} places",
            fix="give more or longer texts",
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    train, test = order[:kept], order[kept:]
    weights = empty_heads(heads, states.shape[1])
    rows: list[Tensor] = []
    for k in range(heads):
        progress(k, heads, f"head {k}")
        head = _Head(weights[f"{k}.0.linear.weight"], weights[f"{k}.0.linear.bias"], *output)
        _fit(head, states[train], following[train, k], epochs, batch, learning_rate, seed)
        rows.append(_accuracy(head, states[test], following[test, k], batch, ranks))
    progress(heads, heads, "fitted")
    return FittedHeads(weights, torch.stack(rows))


def _states(
    program: Program, texts: Iterable[Tensor], heads: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor | None]]:
    """Hidden states [places, width], the tokens [places, heads] to guess there, and the output."""
    arguments = bound_arguments(language_head(program))
    seen: list[Tensor] = []
    states: list[Tensor] = []
    following: list[Tensor] = []

    def watch(node: object, value: Tensor) -> None:
        if node is arguments["input"]:
            seen.append(value)

    for ids in texts:
        past = empty_past(program, len(ids)) if "cached" in program.facts else []
        length = ids.shape[1] - heads - 1
        if length < 1:
            continue
        run(program, [ids, *past], watch=watch)
        states.append(seen.pop()[:, :length].flatten(0, 1).float())
        guesses = [ids[:, 2 + k : 2 + k + length].flatten() for k in range(heads)]
        following.append(torch.stack(guesses, 1))
    if not states:
        return torch.zeros(0, 1), torch.zeros(0, heads, dtype=torch.int64), (torch.zeros(0), None)
    weights = program.weights
    bias = arguments["bias"]
    output = weights[arguments["weight"].target].float()
    return (
        torch.cat(states),
        torch.cat(following),
        (output, None if bias is None else weights[bias.target].float()),
    )


@dataclass
class _Head:
    weight: Tensor
    bias: Tensor
    output: Tensor
    output_bias: Tensor | None

    def __call__(self, states: Tensor) -> Tensor:
        turned = functional.silu(functional.linear(states, self.weight, self.bias))
        return functional.linear(states + turned, self.output, self.output_bias)


def _fit(
    head: _Head,
    states: Tensor,
    wanted: Tensor,
    epochs: int,
    batch: int,
    learning_rate: float,
    seed: int,
) -> None:
    """AdamW on the cross-entropy, its rate falling as a half cosine; changes the weights."""
    parameters = [head.weight.requires_grad_(), head.bias.requires_grad_()]
    steps = epochs * math.ceil(len(states) / batch)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for places in torch.randperm(len(states), generator=generator).split(batch):
            loss = functional.cross_entropy(head(states[places]), wanted[places])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    for parameter in parameters:
        parameter.requires_grad_(False)


def _accuracy(head: _Head, states: Tensor, wanted: Tensor, batch: int, ranks: int) -> Tensor:
    """[ranks]: how often each of the likeliest tokens is the wanted one."""
    right = torch.zeros(ranks)
    with torch.no_grad():
        for rows, tokens in zip(states.split(batch), wanted.split(batch), strict=True):
            found = head(rows).topk(min(ranks, head.output.shape[0])).indices
            right[: found.shape[1]] += (found == tokens[:, None]).sum(0)
    return right / len(states)
