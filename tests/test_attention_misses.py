"""Near misses of attention: each is left as it is, and one sentence says why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_programs import (
    ATTENTION,
    inputs,
    positions,
    raise_attention,
    raised,
    seen,
    trace,
)
from planish.ir.capture import capture_exported
from torch import Tensor, nn

F = nn.functional


def second_reader(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.transpose(2, 3), -1)
    return weights @ v + weights.sum(-1, keepdim=True)


def reads_scores(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = q @ k.transpose(2, 3) * 0.5
    return torch.softmax(scores, -1) @ v + scores.amax(-1, keepdim=True)


def reads_product(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    product = q @ k.transpose(2, 3)
    return torch.softmax(product * 0.5, -1) @ v + product.mean(-1, keepdim=True)


def returns_weights(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(q @ k.transpose(2, 3), -1)
    return weights @ v, weights


def weighs_twice(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.transpose(2, 3), -1)
    return weights @ v + weights @ (v * 2.0)


def pruned_heads(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.transpose(2, 3), -1)
    return (weights * torch.arange(6.0)[:, None, None]) @ v


def sigmoid_weights(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return torch.softmax(torch.sigmoid(q @ k.transpose(2, 3)), -1) @ v


def fewer_values(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """Keys outnumber values: the last one takes weight and gives nothing."""
    weights = torch.softmax(q @ k.transpose(2, 3), -1)
    return weights[..., :-1] @ v[:, :, :-1]


def one_value_for_all(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """Values of another cache, of one example."""
    return torch.softmax(q @ k.transpose(2, 3), -1) @ v[:1]


def temperature_over_masks(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = (q @ k.transpose(2, 3)).masked_fill(~pad[:, None, None], -1e38)
    return torch.softmax(scores * q.mean(-1, keepdim=True).exp(), -1) @ v


def product_of_products(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = (q @ k.transpose(2, 3)) * (k @ q.transpose(2, 3)).transpose(2, 3)
    return torch.softmax(scores, -1) @ v


def capped_twice(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return torch.softmax(torch.tanh(torch.tanh(q @ k.transpose(2, 3))), -1) @ v


def capped_over_masks(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = (q @ k.transpose(2, 3)).masked_fill(~pad[:, None, None], -1e38)
    return torch.softmax(5.0 * torch.tanh(scores), -1) @ v


def dropped(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return F.dropout(torch.softmax(q @ k.transpose(2, 3), -1), 0.25, True) @ v


def dropped_composite(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)


def other_axis(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(2, 3), -2) @ v


def powers(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return torch.softmax((q @ k.transpose(2, 3)).pow(3), -1) @ v


def upper_left(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def widened(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = q[:1] @ k[:1].transpose(2, 3) + pad[:, None, None].float()
    return torch.softmax(scores, -1) @ v


DECLINES: list[tuple[Callable[..., Tensor], str]] = [
    (second_reader, "a second reader, %sum_1, uses the softmax"),
    (reads_scores, "a second reader, %amax, uses the scores"),
    (reads_product, "a second reader, %mean, uses the scores"),
    (returns_weights, "a second reader, an output, uses the softmax"),
    (weighs_twice, "a second reader, %matmul_2, uses the softmax"),
    (pruned_heads, "its weights pass through mul before they meet the values"),
    (fewer_values, "its weights are cut"),
    (one_value_for_all, "its queries, keys and values differ in batch or length"),
    (dropped, "dropout is active (p=0.25)"),
    (dropped_composite, "dropout is active (p=0.5)"),
    (other_axis, "its softmax runs over axis 2 of 4, not over the last"),
    (widened, "a mask has more examples or heads than the scores"),
    (powers, "the scores pass through pow, which attention does not have"),
    (sigmoid_weights, "the scores pass through sigmoid, which attention does not have"),
    (product_of_products, "the scores pass through mul, which attention does not have"),
    (temperature_over_masks, "masked or capped scores are multiplied by a tensor"),
    (capped_twice, "the scores pass through two soft caps"),
    (capped_over_masks, "a mask is applied under the soft cap"),
    (upper_left, "its causal mask starts at the first key, and keys outnumber queries"),
]


@pytest.mark.parametrize(("function", "sentence"), DECLINES)
def test_near_misses(function: Callable[..., Tensor], sentence: str) -> None:
    after, record = raise_attention(trace(function))
    assert seen(after) == []
    assert [entry.reason for entry in record.declined] == [sentence]


class Trained(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(q @ k.transpose(2, 3), -1)
        return F.dropout(weights, 0.1, self.training) @ v


@pytest.mark.parametrize("training", [False, True])
def test_a_model_exported_in_training(training: bool) -> None:
    """The same model is raised once it drops nothing."""
    exported = torch.export.export(Trained().train(training), inputs()[:3], strict=False)
    after, record = raise_attention(capture_exported(exported))
    assert len(seen(after)) == (not training)
    wanted = ["dropout is active (p=0.1)"] if training else []
    assert [entry.reason for entry in record.declined] == wanted


def test_a_mask_over_heads_is_no_causal_mask() -> None:
    """The wrong axis: key j is hidden from head h, not from query i."""

    def over_heads(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        visible = positions(q, k)[1] <= torch.arange(q.shape[1])[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, visible, scale=1.0)

    after, record = raised(over_heads, square=True)
    assert seen(after) == [(False, 0, 0.0, False, "keys")]
    note = "keeps an explicit mask: it differs between heads or examples"
    assert [entry.note for entry in record.applied] == [note]


def test_keys_that_come_transposed_are_turned() -> None:
    """No transpose in the graph: what is multiplied is [.., channels, keys], so it becomes one."""

    def turned(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        return torch.softmax(q @ k, -1) @ v

    q = torch.randn(2, 6, 7, 10)
    k, v = torch.randn(2, 6, 10, 10), torch.randn(2, 6, 10, 12)
    exported = torch.export.export(_Three(turned), (q, k, v), strict=False)
    program = capture_exported(exported)
    after, _ = raise_attention(program, [[q, k, v]])
    (call,) = [n for n in after.graph.nodes if n.target is ATTENTION]
    assert call.args[1].target is torch.ops.aten.transpose.int


class _Three(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.function(q, k, v, q)


def test_keys_and_values_of_two_sources() -> None:
    """What data flow says is enough: values may come from anywhere, one for each key."""

    def mixed(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        other = torch.cat([k, k[..., :2]], -1).roll(1, 0)
        return torch.softmax(q @ k.transpose(2, 3), -1) @ other

    after, record = raised(mixed)
    assert (len(seen(after)), record.declined) == (1, [])
