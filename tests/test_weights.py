"""Weights by name: ties, laziness, copies, counts."""

from __future__ import annotations

import pytest
import torch
from planish.ir.errors import UnknownWeight
from planish.ir.formats import parse_format
from planish.ir.weights import Derived, Weights, dense, entry_bytes, find_ties

A = torch.arange(12.0).reshape(3, 4)
B = torch.arange(10.0).reshape(2, 5)


def tied() -> Weights:
    return Weights({"embed.weight": A, "norm.weight": B}, {"head.weight": "embed.weight"})


def test_a_tie_is_one_entry_with_two_names() -> None:
    weights = tied()
    assert weights["head.weight"] is A
    assert weights.canonical("head.weight") == "embed.weight"
    assert weights.names_of("head.weight") == ["embed.weight", "head.weight"]
    assert list(weights) == ["embed.weight", "norm.weight"]
    assert len(weights) == 2
    assert "head.weight" in weights
    assert (weights.parameter_count(), weights.nbytes()) == (22, 88)


def test_writing_through_an_alias_changes_both_names() -> None:
    weights = tied()
    weights["head.weight"] = B
    assert weights["embed.weight"] is B
    assert list(weights.aliases) == ["head.weight"]


def test_deleting_takes_the_aliases_along() -> None:
    weights = tied()
    del weights["head.weight"]
    assert "embed.weight" not in weights
    assert weights.aliases == {}


def test_copies_share_tensors_and_not_edits() -> None:
    weights = tied()
    copy = weights.copy()
    assert copy["embed.weight"] is A
    copy["embed.weight"] = B
    del copy["norm.weight"]
    assert weights["head.weight"] is A
    assert "norm.weight" in weights


def test_unknown_names_get_the_nearest_one() -> None:
    with pytest.raises(UnknownWeight, match=r"did you mean norm\.weight"):
        tied()["norm.wieght"]


def test_fresh_names_do_not_collide_with_aliases() -> None:
    weights = tied()
    assert weights.fresh_name("q.weight") == "q.weight"
    assert weights.fresh_name("head.weight") == "head.weight_2"
    weights["head.weight_2"] = B
    assert weights.fresh_name("head.weight") == "head.weight_3"


def test_derived_weights_are_computed_on_reading_only() -> None:
    calls: list[int] = []

    def stack(*parts: torch.Tensor) -> torch.Tensor:
        calls.append(len(parts))
        return torch.cat(parts)

    inner = Derived((A,), lambda a: a * 2, A.shape, A.dtype, "doubled")
    made = Derived((A, inner), stack, torch.Size((6, 4)), A.dtype, "stacked")
    weights = Weights({"qk": made})
    assert weights.shape("qk") == (6, 4)
    assert (weights.parameter_count(), weights.nbytes(), entry_bytes(made)) == (24, 96, 96)
    assert calls == []
    assert torch.equal(weights["qk"], torch.cat((A, 2 * A)))
    assert calls == [2]


def test_an_encoded_weight_reads_dense_and_weighs_less() -> None:
    encoded = parse_format("int4-g4-sym").encode(torch.randn(6, 32))
    weights = Weights({"w": encoded})
    assert torch.equal(weights["w"], encoded.decode())
    assert torch.equal(dense(encoded), encoded.decode())
    assert weights.dtype("w") == torch.float32
    assert weights.nbytes() == encoded.nbytes() < 6 * 32 * 4
    assert weights.parameter_count() == 6 * 32


def test_ties_are_equal_views_of_the_same_memory() -> None:
    storage = torch.arange(24.0)
    found = find_ties(
        {
            "one": storage[:12].view(3, 4),
            "same": storage[:12].view(3, 4),
            "other shape": storage[:12].view(4, 3),
            "transposed": storage[:12].view(4, 3).t(),
            "other place": storage[12:].view(3, 4),
            "equal copy": storage[:12].view(3, 4).clone(),
            "empty": torch.empty(0, 4),
            "also empty": torch.empty(0, 4),
        }
    )
    assert found == {"same": "one"}
