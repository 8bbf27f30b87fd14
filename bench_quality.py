"""Quality beside speed: how far a contestant's results are from the baseline's."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from .bench_measures import MIXED, sentences
from .bench_process import Cannot
from .bench_results import Results

if TYPE_CHECKING:
    from .bench_run import Entrant, Plan

WORSE_KL, WORSE_COSINE = 1e-3, 0.9999
"""Beyond these a row is marked as worse: float32 in another order stays far below."""


def measure_quality(
    plan: Plan, taking: Sequence[Entrant], results: Results, tell: Callable[[str], None]
) -> None:
    """Perplexity, KL and top-1 agreement of a decoder; cosine of an encoder.

    The baseline's results are files beside its folder, written when they are first needed.
    """
    for entrant in taking:
        about = {**entrant.about, "threads": None}
        orders = _orders(plan, taking[0].prepared.path, entrant is taking[0])
        writes = any(order["write"] for order in orders)
        if results.get("quality", **about) is not None and not writes:
            continue
        tell(f"{plan.model.name}: quality of {entrant.row.name}")
        try:
            found = [entrant.open().ask(order) for order in orders]
        except Cannot as reason:
            results.add("cannot", **about, measure="quality", why=str(reason))
            continue
        means = {key: fmean(answer[key] for answer in found) for key in found[0]}
        if "nll" in means:
            means["perplexity"] = math.exp(means["nll"])
        results.add("quality", **about, **means, slices=len(found))


def _orders(plan: Plan, folder: Path, is_base: bool) -> list[dict[str, Any]]:
    if plan.model.kind == "encoder":
        given = sentences(plan.text.tokens, MIXED)
        orders = [{"do": "embeddings", "sentences": given}]
    else:
        orders = [{"do": "quality", "ids": list(ids)} for ids in plan.text.slices]
    for order in orders:
        name = hashlib.sha256(json.dumps(order).encode()).hexdigest()[:12]
        file = folder.parent / f"reference-{name}.npy"
        order |= {"file": str(file), "write": is_base and not file.is_file()}
    return orders


def is_worse(quality: Mapping[str, Any] | None) -> bool:
    """Whether a row is marked."""
    if quality is None:
        return False
    return quality.get("kl", 0) > WORSE_KL or quality.get("cosine", 1) < WORSE_COSINE
