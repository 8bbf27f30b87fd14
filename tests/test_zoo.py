"""The tiny models are fit to test with: finite, varied, not square, the same for a seed."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch.utils._pytree import tree_leaves


@pytest.mark.parametrize(("name", "attention"), zoo.CASES)
def test_outputs_are_finite_and_vary_at_both_shapes(name: str, attention: zoo.Attention) -> None:
    sample = zoo.build(name, attention)
    other = sample.other_inputs()
    assert any(other[key].shape != value.shape for key, value in sample.kwargs.items())
    for inputs in (sample.kwargs, other):
        with torch.no_grad():
            leaves = [x for x in tree_leaves(sample.model(**inputs)) if isinstance(x, torch.Tensor)]
        assert leaves
        for leaf in leaves:
            assert torch.isfinite(leaf).all()
            assert leaf.float().std() > 1e-2


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_every_stored_value_is_perturbed(name: str) -> None:
    model = zoo.build(name, zoo.ARCHITECTURES[name].attentions[0]).model
    assert not model.training
    for key, value in model.named_parameters():
        assert value.dtype == torch.float32
        assert value.unique().numel() > 0.9 * value.numel(), key


def test_projections_are_not_square_where_head_size_is_free() -> None:
    for name in ("llama", "qwen2", "gemma", "gemma2", "mistral", "gpt_oss", "mixtral", "t5"):
        model = zoo.build(name, zoo.ARCHITECTURES[name].attentions[0]).model
        for key, value in model.named_parameters():
            assert value.dim() < 2 or value.shape[-1] != value.shape[-2], key


def test_same_seed_same_model_and_another_shape_of_inputs() -> None:
    first, second, third = (zoo.build("llama", seed=seed) for seed in (3, 3, 4))
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key])
    assert not torch.equal(first.kwargs["input_ids"], third.kwargs["input_ids"])
    assert first.kwargs["attention_mask"].tolist()[1][:4] == [0, 0, 0, 1]
    assert zoo.build("bert").kwargs["attention_mask"].tolist()[1][-4:] == [1, 0, 0, 0]
    assert zoo.build("mamba", "eager").other_inputs()["input_ids"].shape == (3, zoo.LENGTH)


def test_attention_form_not_offered_is_refused() -> None:
    with pytest.raises(ValueError, match="bloom offers"):
        zoo.build("bloom", "sdpa")
