"""Whether a kernel's results are right: against the float64 twin, within a stated rounding.

Allowed of an element: twice the largest error that the twin makes in the working dtype, and two
roundings of the largest result. Codes (8-bit results) may differ by one step in 0.5 % of the
elements, as rounding to them may meet a tie; other integers and truth values are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .triton_spec import Arguments, Case, TritonSpec

CODES_APART = 0.005
"""The share of codes that may differ by one step."""


@dataclass(frozen=True)
class Judgement:
    """right: all of the results are. sentence: the first that is not, or the largest error."""

    right: bool
    sentence: str


def judge(
    spec: TritonSpec, case: Case, arguments: Arguments, outputs: Sequence[Tensor]
) -> Judgement:
    """Compare the results of a kernel with those of its twin; arguments: as before the launch."""
    twin = as_tuple(spec.twin(**arguments))
    exact = as_tuple(spec.twin(**{name: _widened(value) for name, value in arguments.items()}))
    if len(outputs) != len(twin):
        return Judgement(False, f"{len(outputs)} results where the twin has {len(twin)}")
    judged = [
        _judge_one(have, want, true, case.unit)
        for have, want, true in zip(outputs, twin, exact, strict=True)
    ]
    sentences = [
        f"result {place}: {one.sentence}" if len(judged) > 1 else one.sentence
        for place, one in enumerate(judged)
    ]
    wrong = [text for text, one in zip(sentences, judged, strict=True) if not one.right]
    return Judgement(not wrong, wrong[0] if wrong else "; ".join(sentences))


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    """One result or several, as several."""
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


def _widened(value: Any) -> Any:
    """Floating tensors, and those in lists, in float64."""
    if isinstance(value, (tuple, list)):
        return type(value)(_widened(part) for part in value)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _judge_one(have: Tensor, twin: Tensor, exact: Tensor, unit: float) -> Judgement:
    if have.shape != twin.shape or have.dtype != twin.dtype:
        found = f"{have.dtype} {list(have.shape)}"
        return Judgement(False, f"{found} where the twin has {twin.dtype} {list(twin.shape)}")
    if twin.is_floating_point() and twin.itemsize > 1:
        return _judge_floats(have, twin, exact.double(), unit)
    return _judge_codes(have, twin, exact)


def _judge_floats(have: Tensor, twin: Tensor, exact: Tensor, unit: float) -> Judgement:
    narrow = exact.to(have.dtype)
    odd = _kinds(have) != _kinds(narrow)
    wrong = odd & (_kinds(have) != _kinds(twin))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        text = f"{int(wrong.sum())} of {wrong.numel()} elements are NaN or infinite, or should be"
        return Judgement(False, f"{text}: at {at} {have[at].item()} for {narrow[at].item()}")
    number = have.isfinite() & narrow.isfinite()
    error = _largest((have.double() - exact).abs()[number])
    twins = _largest((twin.double() - exact).abs()[number & twin.isfinite()])
    largest = _largest(exact.abs()[number])
    rounding = max(torch.finfo(have.dtype).eps / 2, unit)
    allowed = 2 * twins + 2 * rounding * largest
    text = f"error {error:.1e}, allowed {allowed:.1e}"
    return Judgement(error <= allowed, text if error <= allowed else f"wrong by {text}")


def _kinds(values: Tensor) -> Tensor:
    """0 finite, 1 and -1 infinite, 2 NaN."""
    kinds = torch.zeros(values.shape, dtype=torch.int8)
    kinds[values == torch.inf], kinds[values == -torch.inf], kinds[values.isnan()] = 1, -1, 2
    return kinds


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def _judge_codes(have: Tensor, twin: Tensor, exact: Tensor) -> Judgement:
    codes, wanted, best = (_codes(values.to(have.dtype)) for values in (have, twin, exact))
    apart = torch.minimum((codes - wanted).abs(), (codes - best).abs())
    differ, most = int((apart > 0).sum()), int(apart.max()) if apart.numel() else 0
    rounded = have.dtype.itemsize == 1 and have.dtype != torch.bool
    allowed = int(CODES_APART * apart.numel()) if rounded else 0
    right = differ <= allowed and most <= (1 if rounded else 0)
    text = f"{differ} of {apart.numel()} codes differ"
    text += f" by up to {most}" if differ else ""
    return Judgement(right, text if right else f"wrong codes: {text}, allowed {allowed} by 1")


def _codes(values: Tensor) -> Tensor:
    """As integers; fp8 in the order of its values, so that neighbours are one apart."""
    if not values.is_floating_point():
        return values.to(torch.int64)
    bits = values.view(torch.uint8).to(torch.int64)
    return torch.where(bits >= 128, 128 - bits, bits)
