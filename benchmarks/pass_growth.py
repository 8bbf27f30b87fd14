"""How the time of capture and of the `exact` recipe grows with the number of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pass_time import CAPTURE, TOTAL, measure, narrow
from planish.bench_results import Results


def measure_growth(
    results: Results, layers: Sequence[int], tell: Callable[[str], None], rounds: int = 3
) -> None:
    """Records `passes`: CPU seconds, the fastest of some rounds, no numeric verification.

    `pass_time.py` by itself tells every pass apart.
    """
    for count in layers:
        if results.get("passes", measure=count) is not None:
            continue
        tell(f"capture and passes of {count} layers")
        times = measure(narrow(count), rounds)
        results.add("passes", measure=count, capture=times[CAPTURE], pipeline=times[TOTAL])
