"""What planish is to reach against its peers, and whether it does, from a benchmark's results.

A peer is compared with the fastest row of planish that is no worse in quality than the peer is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planish.bench_results import Record, Results
from planish.bench_table import Speed, current, loss, quality_of, speeds_of, table


@dataclass(frozen=True)
class Target:
    """A ratio to the best peer of a heat (of those named, if any are).

    share: of the machine's limit, which is enough too. cosine: the least of what counts.
    """

    model: str
    measure: str
    heat: str
    ratio: float
    peers: tuple[str, ...] = ()
    share: float | None = None
    cosine: float | None = None


_FLOAT = ("Inductor", "onnxruntime")
_DECODE = "decode after 128, batch 1"
TARGETS = (
    Target("smollm2", _DECODE, "int4", 1.2, share=0.8),
    Target("smollm2", _DECODE, "int8", 1.2, share=0.8),
    Target("smollm2", "prefill 512", "int8", 1.2),
    Target("smollm2", _DECODE, "float32", 1.1, _FLOAT),
    Target("smollm2", "prefill 512", "float32", 1.1, _FLOAT),
    *(
        Target("minilm", measure, heat, ratio, peers, cosine=cosine)
        for heat, ratio, peers, cosine in (
            ("float32", 1.1, (*_FLOAT, "OpenVINO float32"), None),
            ("int8", 1.2, (), 0.995),
        )
        for measure in ("1 x 128", "32 x 128", "32 mixed")
    ),
)


def targets_markdown(results: Results) -> str:
    """A table of all targets that the results have rows for, by number of threads."""
    rows = [
        _row(target, threads, results)
        for target in TARGETS
        for threads in sorted({r["threads"] for r in results.all("speed", model=target.model)})
    ]
    columns = ["target", "threads", "planish", "hardest peer", "ratio", "share of the limit", ""]
    return f"## Targets\n\n{table(columns, rows)}\n" if rows else ""


def _row(target: Target, threads: int, results: Results) -> list[str]:
    made = {r["contestant"]: r for r in current(results, target.model)}
    speeds = speeds_of(results, target.model, threads).get(target.measure, {})
    quality = {name: quality_of(results, record) for name, record in made.items()}
    ours = [n for n in speeds if n.startswith("planish") and _counts(quality[n], target)]
    peers = [name for name in speeds if _is_peer(name, made[name], target)]
    name = f"{target.model}, {target.heat}, {target.measure}: {target.ratio}×"
    name += f" or {100 * target.share:.0f}% of the limit" if target.share else ""
    duels = [_duel(peer, ours, speeds, quality) for peer in peers]
    if not duels:
        return [name, str(threads), "–", "no peer was measured", "–", "–", "–"]
    ratio, ours_name, peer = min(duels)
    if ours_name is None:
        return [name, str(threads), "none as good", peer, "–", "–", "missed"]
    share = speeds[ours_name].share
    reached = ratio >= target.ratio or (target.share is not None and share >= target.share)
    told = [ours_name, peer, f"{ratio:.2f}", f"{100 * share:.0f}% ({speeds[ours_name].bound})"]
    return [name, str(threads), *told, "reached" if reached else "missed"]


def _duel(
    peer: str,
    ours: Sequence[str],
    speeds: Mapping[str, Speed],
    quality: Mapping[str, Record | None],
) -> tuple[float, str | None, str]:
    """(how much faster than the peer, the row that is, the peer)."""
    good = [name for name in ours if loss(quality[name]) <= loss(quality[peer])]
    if not good:
        return 0.0, None, peer
    best = max(good, key=lambda name: _rate(speeds[name]))
    return _rate(speeds[best]) / _rate(speeds[peer]), best, peer


def _rate(speed: Speed) -> float:
    return 1 / speed.value if speed.unit == "ms" else speed.value


def _counts(quality: Record | None, target: Target) -> bool:
    return target.cosine is None or (quality or {}).get("cosine", 0) >= target.cosine


def _is_peer(name: str, made: Record, target: Target) -> bool:
    if name.startswith("planish") or made["heat"] != target.heat:
        return False
    return not target.peers or name in target.peers
