"""The results of a benchmark as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from .bench_limits import share
from .bench_quality import is_worse
from .bench_results import Record, Results

LEGEND = """Medians of the rounds; ± is half of the range between the quartiles, in percent of the
median. × is the median ratio to eager in the same rounds (above 1 is faster). The last figure is
the share of the machine's limit that the row reaches: m where reading memory binds, a where
arithmetic does; more than 100 % means that less than the declared bytes is read from memory.
† is worse in quality than rounding in another order explains (KL above 1e-3 nats, cosine below
0.9999). ‡ is beaten: another row is faster and no worse in quality."""


@dataclass(frozen=True)
class Speed:
    """One row and measure. value: in the unit, the median; spread, ratio, share as the legend."""

    value: float
    spread: float
    ratio: float | None
    share: float
    bound: str
    unit: str

    @property
    def text(self) -> str:
        """As a cell."""
        ratio = "" if self.ratio is None else f" · {self.ratio:.2f}×"
        digits = 0 if self.value >= 100 else 1
        value = f"{self.value:.{digits}f} ±{100 * self.spread:.0f}%"
        return f"{value}{ratio} · {100 * self.share:.0f}%{self.bound[0]}"


def speed(record: Record, limits: Record) -> Speed:
    """What a record of samples comes to."""
    walls, base, work = record["walls"], record["base"], record["work"]
    in_ms = record["unit"] == "ms"
    values = [wall * 1e3 if in_ms else work / wall for wall in walls]
    ratios = [b / wall for b, wall in zip(base, walls, strict=False)]
    middle = median(values)
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (middle,) * 3
    cost = record["bytes"], record["operations"]
    part, bound = share(limits, cost, record["calls"], record["compute"], median(walls))
    ratio = median(ratios) if ratios else None
    return Speed(middle, (high - low) / 2 / middle, ratio, part, bound, record["unit"])


def markdown(results: Results) -> str:
    """All tables: speeds for each model and number of threads, costs, limits, who could not."""
    runs = results.all("run")
    parts = ["# Benchmark", *(_told(run) for run in runs[-1:]), LEGEND]
    models = list(dict.fromkeys(r["model"] for r in results.all("prepared")))
    for model in models:
        threads = sorted({r["threads"] for r in results.all("speed", model=model)})
        parts += [_speeds(results, model, count) for count in threads]
        parts.append(_costs(results, model))
    parts += [_limits(results), _passes(results), _cannot(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _told(run: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    lines = [f"`{run['command']}`", f"On {run['machine']}. {run['text']}. {versions}."]
    return "\n\n".join(lines)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def current(results: Results, model: str) -> list[Record]:
    """What was prepared last of each contestant, in the order of the heats."""
    last = {r["contestant"]: r for r in results.all("prepared", model=model)}
    heats = list(dict.fromkeys(r["heat"] for r in last.values()))
    return sorted(last.values(), key=lambda r: heats.index(r["heat"]))


def speeds_of(results: Results, model: str, threads: int) -> dict[str, dict[str, Speed]]:
    """By measure and contestant."""
    limits = results.get("limits", threads=threads)
    keys = {r["contestant"]: r["key"] for r in current(results, model)}
    found: dict[str, dict[str, Speed]] = {}
    for record in results.all("speed", model=model, threads=threads):
        if limits is not None and keys.get(record["contestant"]) == record["key"]:
            row = found.setdefault(record["measure"], {})
            row[record["contestant"]] = speed(record, limits)
    return found


def quality_of(results: Results, prepared: Record) -> Record | None:
    """Of a contestant."""
    about = {key: prepared[key] for key in ("model", "contestant", "key")}
    return results.get("quality", **about, threads=None)


def _speeds(results: Results, model: str, threads: int) -> str:
    found = speeds_of(results, model, threads)
    rows = current(results, model)
    qualities = {r["contestant"]: quality_of(results, r) for r in rows}
    lines = [
        [name + (" †" if is_worse(qualities[name]) else "")]
        + [_cell(name, by_name, qualities) for by_name in found.values()]
        for name in (row["contestant"] for row in rows)
    ]
    columns = [f"{m}, {next(iter(by.values())).unit}" for m, by in found.items()]
    return f"## {model}, {threads} threads\n\n" + table(["", *columns], lines)


def _cell(name: str, by_name: Mapping[str, Speed], qualities: Mapping[str, Record | None]) -> str:
    mine = by_name.get(name)
    if mine is None:
        return "–"
    beaten = any(
        _faster(other, mine) and loss(qualities[rival]) <= loss(qualities[name])
        for rival, other in by_name.items()
    )
    return mine.text + (" ‡" if beaten else "")


def _faster(other: Speed, mine: Speed) -> bool:
    return other.value < mine.value if mine.unit == "ms" else other.value > mine.value


def loss(quality: Mapping[str, Any] | None) -> float:
    """How much worse than the baseline; 0 for what rounding explains, the worst if unknown."""
    if quality is None:
        return float("inf")
    if not is_worse(quality):
        return 0.0
    return quality["kl"] if "kl" in quality else 1 - quality["cosine"]


def _costs(results: Results, model: str) -> str:
    rows: list[list[str]] = []
    for made in current(results, model):
        about = {key: made[key] for key in ("model", "contestant", "key")}
        loads = [r["load"] for r in results.all("loaded", **about)]
        peaks = [r["peak"] for r in results.all("memory", **about)]
        speeds = results.all("speed", **about)
        firsts = [max(0.0, r["first"] - median(r["walls"])) for r in speeds]
        rows.append(
            [
                made["contestant"],
                *_quality_cells(quality_of(results, made)),
                f"{made['size'] / 1e6:.0f}",
                f"{median(loads):.2f}" if loads else "–",
                f"{max(peaks) / 1e6:.0f}" if peaks else "–",
                f"{made['cost']['seconds']:.1f}",
                f"{made['cost']['peak'] / 1e6:.0f}",
                f"{sum(firsts):.1f}" if firsts else "–",
            ]
        )
    is_encoder = any("cosine" in (quality_of(results, r) or {}) for r in current(results, model))
    columns = ["cosine, least", "cosine, mean"] if is_encoder else ["perplexity", "KL", "top-1"]
    columns = ["", *columns, "MB on disk", "load, s", "peak MB", "optimize, s"]
    columns += ["optimize, peak MB", "first calls, s more"]
    note = "Loading is with the files in the page cache; memory includes mapped files and Python; "
    note += "the first calls of all measures, compiling included, took so much longer than others."
    return f"## {model}: quality and costs\n\n{note}\n\n{table(columns, rows)}"


def _quality_cells(quality: Record | None) -> list[str]:
    if quality is None:
        return ["–", "–", "–"]
    if "cosine" in quality:
        return [f"{quality['cosine']:.5f}", f"{quality['mean_cosine']:.5f}"]
    return [f"{quality['perplexity']:.3f}", f"{quality['kl']:.5f}", f"{quality['top1']:.4f}"]


def _limits(results: Results) -> str:
    found = results.all("limits")
    if not found:
        return ""
    sizes = list(found[0]["read"])
    columns = ["threads", *(f"read {int(s) >> 20} MiB, GB/s" for s in sizes)]
    columns += ["float32, GFLOP/s", "int8, GOP/s"]
    rows = [
        [str(r["threads"]), *(f"{r['read'][s] / 1e9:.1f}" for s in sizes)]
        + [f"{r[kind] / 1e9:.0f}" for kind in ("float32", "int8")]
        for r in found
    ]
    return f"## Limits of the machine\n\n{table(columns, rows)}"


def _passes(results: Results) -> str:
    found = results.all("passes")
    if not found:
        return ""
    rows: list[list[str]] = []
    for r in found:
        both = r["capture"], r["pipeline"]
        rows.append([str(r["measure"]), *(f"{seconds:.2f}" for seconds in both)])
        rows[-1] += [f"{1e3 * seconds / r['measure']:.0f}" for seconds in both]
    columns = ["layers", "capture, s", "exact pipeline, s", "ms a layer", "ms a layer"]
    return f"## Time of capture and passes as layers grow\n\n{table(columns, rows)}"


def _cannot(results: Results) -> str:
    rows: list[list[str]] = []
    for r in results.all("cannot"):
        row = [r["model"], r["contestant"], r["measure"], r["why"].replace("|", "\\|")]
        rows += [] if row in rows else [row]
    return f"## What could not run\n\n{table(['', '', '', 'why'], rows)}" if rows else ""
