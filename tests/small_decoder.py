"""One layer of a decoder with odd sizes, whose parts a test can replace."""

from __future__ import annotations

from collections.abc import Callable

import torch
from planish.ir.capture import capture_module
from planish.ir.program import Program
from planish.recipes import pipeline
from torch import Tensor, nn

VOCABULARY, PLACES, HEADS, HEAD, VALUE_HEAD = 29, 37, 3, 5, 7
Visible = Callable[[Tensor, Tensor], Tensor]


def causal(query: Tensor, key: Tensor) -> Tensor:
    """bool[queries, keys]: keys up to the query's own place."""
    return key <= query


class Places(nn.Module):
    """f32[length, 15] of as many places."""

    def __init__(self, width: int, place: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(PLACES, width), place

    def forward(self, length: int, given: Tensor | None) -> Tensor:
        return self.table(self.place(torch.arange(length)) if given is None else given)


class SmallDecoder(nn.Module):
    """Token ids int64[batch, length] to logits f32[batch, length, 29].

    With padding int64[batch, length] (0: hidden) and places int64[batch, length] if given.

    visible: the mask, of columns of query places and rows of key places; mix: what is done to
    f32[batch, length, 15] before attention; place: numbers of places from arange.
    """

    def __init__(
        self,
        visible: Visible = causal,
        mix: Callable[[Tensor], Tensor] = lambda x: x,
        place: Callable[[Tensor], Tensor] = lambda counted: counted,
    ) -> None:
        super().__init__()
        torch.manual_seed(3)
        width = HEADS * HEAD
        self.table, self.places = nn.Embedding(VOCABULARY, width), Places(width, place)
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, HEAD)
        self.v, self.out = nn.Linear(width, VALUE_HEAD), nn.Linear(HEADS * VALUE_HEAD, VOCABULARY)
        self.visible, self.mix = visible, mix

    def forward(
        self, tokens: Tensor, padding: Tensor | None = None, places: Tensor | None = None
    ) -> Tensor:
        batch, length = tokens.shape
        x = self.mix(self.table(tokens) + self.places(length, places))
        q = self.q(x).view(batch, length, HEADS, HEAD).transpose(1, 2)
        k, v = self.k(x)[:, None], self.v(x)[:, None]
        counted = torch.arange(length)
        mask = self.visible(counted[:, None], counted[None, :])
        if padding is not None:
            mask = mask & padding[:, None, None, :].bool()
        y = nn.functional.scaled_dot_product_attention(
            q, k.expand(-1, HEADS, -1, -1), v.expand(-1, HEADS, -1, -1), mask, scale=0.4
        )
        return self.out(y.transpose(1, 2).reshape(batch, length, HEADS * VALUE_HEAD))


def tokens(batch: int = 2, length: int = 11) -> Tensor:
    return torch.randint(
        1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(batch)
    )


def left_padding(batch: int, length: int) -> Tensor:
    """int64[batch, length]: row i begins with 2 i zeros."""
    return (torch.arange(length)[None] >= 2 * torch.arange(batch)[:, None]).long()


def raised(module: SmallDecoder, *more: str) -> Program:
    """Captured from token ids and, if named, padding and places."""
    padding = left_padding(*tokens().shape)
    offered = {"padding": padding, "places": (padding.cumsum(1) - 1).clamp_min(0)}
    inputs = {"tokens": tokens(), **{name: offered[name] for name in more}}
    return pipeline("raise").run(capture_module(module.eval(), (), inputs))
