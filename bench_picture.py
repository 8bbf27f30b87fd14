"""The results of a benchmark as pictures: bars with the machine's limit, and speed by quality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .bench_quality import is_worse
from .bench_results import Results
from .bench_table import current, quality_of, speeds_of
from .search_picture import import_matplotlib

_COLOURS = {"planish": "C0", "eager": "0.6", "other": "C1"}


def draw(results: Results, folder: Path) -> list[Path]:
    """Two PNG files for each model and number of threads; needs the extra `report`."""
    made: list[Path] = []
    for model in dict.fromkeys(r["model"] for r in results.all("prepared")):
        for threads in sorted({r["threads"] for r in results.all("speed", model=model)}):
            stem = f"{model}-{threads}-threads"
            made.append(_bars(results, model, threads, folder / f"{stem}.png"))
            made.append(_scatter(results, model, threads, folder / f"{stem}-quality.png"))
    return made


def _save(figure: Any, canvas: Any, file: Path) -> Path:
    canvas.FigureCanvasAgg(figure).print_png(str(file), metadata={"Software": "planish"})
    return file


def _colour(name: str) -> str:
    return _COLOURS.get(name.split()[0], _COLOURS["other"])


def _bars(results: Results, model: str, threads: int, file: Path) -> Path:
    """A panel for each measure: speed of every row, and what the machine's limit would allow it."""
    figures, canvas = import_matplotlib()
    found = speeds_of(results, model, threads)
    names = [r["contestant"] for r in current(results, model)]
    worse = {r["contestant"]: is_worse(quality_of(results, r)) for r in current(results, model)}
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    size = (4.6 * columns + 1.5, (0.24 * len(names) + 0.9) * lines)
    figure: Any = figures.Figure(figsize=size, layout="constrained")
    panels: Any = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes in panels.flat[len(found) :]:
        axes.set_visible(False)
    for axes, (measure, by_name) in zip(panels.flat, found.items(), strict=False):
        for place, name in enumerate(names):
            if name not in by_name:
                continue
            mine = by_name[name]
            limit = mine.value * (mine.share if mine.unit == "ms" else 1 / mine.share)
            error = mine.value * mine.spread
            hatch = "///" if worse[name] else None
            axes.barh(place, mine.value, xerr=error, color=_colour(name), hatch=hatch, alpha=0.85)
            axes.plot([limit, limit], [place - 0.4, place + 0.4], color="k", linewidth=1)
            text = f" {mine.ratio:.2f}×" if mine.ratio is not None else ""
            axes.annotate(text, (mine.value, place), va="center", fontsize=6)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        fastest = max((by_name[n].value for n in by_name), default=1)
        axes.set_xlim(0, 1.25 * fastest)
        axes.set_ylim(len(names) - 0.5, -0.5)
        unit = next(iter(by_name.values())).unit
        better = "less" if unit == "ms" else "more"
        axes.set_title(f"{measure} ({unit}, {better} is better)", fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
    title = f"{model}, {threads} threads. Black: the limit of the machine; hatched: worse quality"
    figure.suptitle(title, fontsize=9)
    return _save(figure, canvas, file)


def _scatter(results: Results, model: str, threads: int, file: Path) -> Path:
    """Ratio to eager against the loss of quality; the rows are numbered."""
    figures, canvas = import_matplotlib()
    found = speeds_of(results, model, threads)
    shown = [m for m in ("prefill 512", "decode after 128, batch 1") if m in found]
    shown = shown or list(found)[:2]
    rows = {r["contestant"]: quality_of(results, r) for r in current(results, model)}
    numbers = {name: number for number, name in enumerate(rows, 1)}
    figure: Any = figures.Figure(figsize=(5.6 * len(shown) + 3, 5.6), layout="constrained")
    widths = [5.6] * len(shown) + [3]
    panels: Any = figure.subplots(1, len(shown) + 1, squeeze=False, width_ratios=widths)
    for axes, measure in zip(panels.flat, shown, strict=False):
        for name, mine in found[measure].items():
            quality = rows.get(name)
            if quality is None or mine.ratio is None:
                continue
            loss = quality["kl"] if "kl" in quality else 1 - quality["cosine"]
            place = (mine.ratio, max(loss, 1e-7))
            axes.plot(*place, "o", color=_colour(name), markersize=11, alpha=0.8)
            centred = {"ha": "center", "va": "center", "fontsize": 6, "color": "w"}
            axes.annotate(str(numbers[name]), place, **centred)
        axes.set_yscale("log")
        axes.set_title(measure, fontsize=9)
        axes.set_xlabel("ratio to eager (right is faster)", fontsize=8)
        axes.set_ylabel("KL to eager, nats, or 1 - cosine (lower is better)", fontsize=8)
        axes.margins(0.08)
        axes.grid(visible=True, alpha=0.25)
    panels[0, -1].set_axis_off()
    words = "\n".join(f"{number}  {name}" for name, number in numbers.items())
    panels[0, -1].text(0, 1, words, va="top", fontsize=7, transform=panels[0, -1].transAxes)
    figure.suptitle(f"{model}, {threads} threads", fontsize=10)
    return _save(figure, canvas, file)
