"""Masks are proven causal or windowed on their own arithmetic, or stay explicit and say why."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from attention_programs import CAUSAL, positions, raise_attention, raised, seen, squares
from planish.ir.capture import capture_module
from planish.passes.mask_positions import Form, formula, recognize, whole
from torch import Tensor, nn
from torch.export import Dim

F = nn.functional
EXPLICIT = "keeps an explicit mask: "
NEITHER = EXPLICIT + "its positional part is neither causal nor a window"

Visible = Callable[[Tensor, Tensor], Tensor]
FORMS: list[tuple[str, Visible, tuple[bool, int]]] = [
    ("causal", lambda i, j: j <= i, (True, 0)),
    ("negated", lambda i, j: ~(j > i), (True, 0)),
    ("window", lambda i, j: (j <= i) & (j > i - 4), (True, 4)),
    ("window by distance", lambda i, j: (i - j < 5) & (i >= j), (True, 5)),
    ("long window", lambda i, j: (i - j < 262144) & (i >= j), (True, 262144)),
    ("all", lambda i, j: (i >= -99) & (j >= 0), (False, 0)),
    ("only later", lambda i, j: j >= i, (False, 1)),
]
OTHERS: list[tuple[str, Visible, str]] = [
    ("one ahead", lambda i, j: j <= i + 1, " behind a query: it sees all keys back and 1 ahead"),
    ("only earlier", lambda i, j: j < i, ": query 0 does not see key 0"),
    ("reversed", lambda i, j: j > i, ": query 0 does not see key 0"),
    ("both sides", lambda i, j: (j - i).abs() < 3, " behind a query: it sees 2 keys back and 2"),
    ("in blocks", lambda i, j: (j <= i) & (j // 4 == i // 4), ": it is causal inside blocks of 4"),
    ("but for the far", lambda i, j: (j <= i) | (j > 70), ": query 0 sees key 71"),
    ("but for the very far", lambda i, j: (j <= i) | (j > 30000), ": query 0 sees key 30001"),
    ("but for the last", lambda i, j: (j <= i) & (i < 90000), ": query 90000 does not see key 0"),
    ("all but itself", lambda i, j: (j <= i) & (i - j != 7000), ": query 7000 does not see key 0"),
]


def masked(visible: Visible) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, visible(*positions(q, k)), scale=1.0)

    return function


@pytest.mark.parametrize(("name", "visible", "expected"), FORMS)
def test_masks_are_proven(name: str, visible: Visible, expected: tuple[bool, int]) -> None:
    after, record = raised(masked(visible), square=True)
    assert [(s[:2], s[4]) for s in seen(after)] == [(expected, "none")]
    assert [entry.note for entry in record.applied] == [""]
    assert squares(after) == []


@pytest.mark.parametrize(("name", "visible", "why"), OTHERS)
def test_others_stay_explicit(name: str, visible: Visible, why: str) -> None:
    after, record = raised(masked(visible), square=True)
    assert seen(after) == [(False, 0, 0.0, False, "scores")]
    assert record.applied[0].note.startswith(NEITHER + why)


def test_more_keys_than_queries() -> None:
    """The places of queries are counted from the last key, where lengths differ."""
    after, _ = raised(masked(lambda i, j: (j <= i) & (j > i - 20)))
    assert seen(after) == [(True, 20, 0.0, False, "none")]
    after, record = raised(masked(lambda i, j: j <= i - i[0]))
    assert record.applied[0].note.startswith(NEITHER + ": query ")


class Table(nn.Module):
    """Attention with a stored mask, cut to the length of the text."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cut = self.table[: q.shape[2], : q.shape[2]]
        scores = torch.where(cut, q @ k.transpose(2, 3), torch.finfo(q.dtype).min)
        return torch.softmax(scores, -1) @ v


@pytest.mark.parametrize(("hole", "expected"), [(False, (True, 0)), (True, (False, 0))])
def test_a_stored_mask_is_read_to_its_end(hole: bool, expected: tuple[bool, int]) -> None:
    """A table that is causal in its first forty rows and then is not."""
    table = torch.ones(64, 64, dtype=torch.bool).tril()
    table[40, 2] = not hole
    q, k, v = torch.randn(3, 2, 3, 9, 5).unbind(0)
    shapes = [{2: Dim("length", max=63)}] * 3
    program = capture_module(Table(table), (q, k, v), dynamic_shapes=tuple(shapes))
    after, record = raise_attention(program, [[q, k, v]])
    assert seen(after)[0][:2] == expected
    assert record.applied[0].note == (NEITHER + ": query 40 does not see key 2" if hole else "")


def test_spellings_of_additive_causal_masks() -> None:
    def triangle(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        mask = torch.full((q.shape[2], k.shape[2]), -math.inf).triu(1)
        return torch.softmax(q @ k.transpose(2, 3) + mask, -1) @ v

    def subtracted(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        i, j = positions(q, k)
        mask = (1.0 - (j <= i).float()) * torch.finfo(torch.float32).min
        return torch.softmax(q @ k.transpose(2, 3) + mask, -1) @ v

    def compared(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        """An additive mask, turned into a boolean one again in two ways."""
        i, j = positions(q, k)
        mask = torch.where(j <= i, 0.0, torch.finfo(torch.float32).min)
        scores = (q @ k.transpose(2, 3)).masked_fill(mask < -1, -math.inf)
        return torch.softmax(scores.masked_fill(mask.bool(), -math.inf), -1) @ v

    for function in (triangle, subtracted, compared):
        after, _ = raised(function, square=True)
        assert seen(after) == [CAUSAL], function


def test_a_bias_does_not_take_the_causal_mask_with_it() -> None:
    """Linear biases (ALiBi) and padding stay, of [heads, 1, keys] and not of [queries, keys]."""

    def alibi(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        i, j = positions(q, k)
        visible = (j <= i)[None, None] & pad[:, None, None, :]
        mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
        slopes = 0.5 ** torch.arange(1, q.shape[1] + 1)
        bias = (slopes[:, None, None] * j).masked_fill(mask < -1, torch.finfo(torch.float32).min)
        return F.scaled_dot_product_attention(q, k, v, bias, scale=0.3)

    after, record = raised(alibi, square=True)
    assert seen(after) == [(True, 0, 0.0, False, "keys")]
    assert ([entry.note for entry in record.applied], squares(after)) == ([""], [])


def test_documents_of_a_packed_text_stay_a_mask() -> None:
    """What depends on data stays; that it is causal besides is still said."""

    def packed(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        i, j = positions(q, k)
        same = pad[:, :, None] == pad[:, None, :]
        return F.scaled_dot_product_attention(q, k, v, (j <= i) & same[:, None], scale=1.0)

    after, record = raised(packed, square=True)
    assert seen(after) == [(True, 0, 0.0, False, "scores")]
    notes = [entry.note for entry in record.applied]
    assert notes == ["keeps a mask of queries by keys: it depends on the inputs"]


def test_two_masks_over_keys_are_no_mask_of_queries() -> None:
    def padded(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        visible = (pad & (v[:, 0, :, 0] > -1.0))[:, None, None, :] & (positions(q, k)[1] >= 0)
        return F.scaled_dot_product_attention(q, k, v, visible, scale=1.0)

    after, record = raised(padded)
    assert seen(after) == [(False, 0, 0.0, False, "keys")]
    assert [entry.note for entry in record.applied] == [""]


def test_fills_that_add_up_keep_the_mask() -> None:
    lowest = torch.finfo(torch.float32).min

    def twice(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        i, j = positions(q, k)
        mask = torch.where(j <= i, 0.0, lowest) + torch.where(pad[:, None, None], 0.0, lowest)
        return torch.softmax(q @ k.transpose(2, 3) + mask, -1) @ v

    def floored(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        i, j = positions(q, k)
        mask = torch.where(j <= i, 0.0, lowest) + torch.where(pad[:, None, None], 0.0, lowest)
        scores = torch.maximum(q @ k.transpose(2, 3) + mask, torch.tensor(lowest))
        return torch.softmax(scores, -1) @ v

    def weak(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        mask = torch.where(pad[:, None, None], 0.0, -10000.0)
        return torch.softmax(q @ k.transpose(2, 3) + mask, -1) @ v

    notes = [raised(f, square=True)[1].applied[0].note for f in (twice, floored, weak)]
    assert notes == [
        EXPLICIT + "several finite fills add up where a query sees no key",
        "",
        EXPLICIT + "its fill -10000 does not outweigh the scores where a query sees no key",
    ]


def test_recognize_takes_every_element() -> None:
    masks = [whole(torch.ones(n, n, dtype=torch.bool).tril()) for n in (3, 5, 9)]
    assert recognize(masks) == Form(causal=True)
    masks[1].visible[2, 4] = True
    assert recognize(masks).fault != ""


def test_a_window_needs_its_edge_among_the_places() -> None:
    """Seen at places 0, 1, 2 and 90, a window of 50 could be one of 80 as well."""
    places = torch.tensor([0, 1, 2, 90])
    from planish.passes.mask_positions import Seen

    assert recognize([Seen(places, places, formula(places, places, True, 50))]).fault != ""
    places = torch.arange(91)
    seen = Seen(places, places, formula(places, places, True, 50))
    assert recognize([seen]) == Form(causal=True, window=50)
