"""HQQ: fewer large errors than rounding to nearest, no data, and the formats it leaves to that."""

from __future__ import annotations

import pytest
import torch
from captured import captured
from planish.ir.encoded import Encoded
from planish.ir.errors import WrongOption
from planish.passes.pipeline import Pipeline
from planish.passes.quantize_hqq import QuantizeHqq
from planish.passes.quantize_weights import QuantizeWeights


def test_offsets_of_the_least_p_norm() -> None:
    before = captured("gpt2")
    line = Pipeline([QuantizeHqq(bits=3, group_size=16)], verify="numbers")
    after = line.run(before)
    plain = Pipeline([QuantizeWeights(format="int3-g16-offset-f16")]).run(before)
    changed = [a.before for a in after.history.records[-1].applied]
    assert changed
    for name in changed:
        entry, nearest = after.weights.entry(name), plain.weights.entry(name)
        assert isinstance(entry, Encoded)
        assert isinstance(nearest, Encoded)
        assert entry.format == nearest.format
        assert torch.equal(entry.scale, nearest.scale)
        exact = before.weights[name]
        ours = (after.weights[name] - exact).abs().pow(0.7).sum()
        theirs = (plain.weights[name] - exact).abs().pow(0.7).sum()
        assert ours < theirs


def test_symmetric_formats_are_rounded_to_nearest() -> None:
    before = captured("llama")
    options = {"bits": 4, "group_size": 4, "symmetric": True, "scale_dtype": "float32"}
    found = Pipeline([QuantizeHqq(**options)]).run(before)
    plain = Pipeline([QuantizeWeights(**options)]).run(before)
    assert all(found.weights.entry(n) == plain.weights.entry(n) for n in _encoded(found))


def _encoded(program: object) -> list[str]:
    weights = program.weights  # type: ignore[attr-defined]
    return [n for n in weights if isinstance(weights.entry(n), Encoded)]  # type: ignore[reportUnknownVariableType]


def test_p_must_be_a_norm_that_forgives_outliers() -> None:
    with pytest.raises(WrongOption, match="above 0, at most 1"):
        QuantizeHqq(p=2)
