"""The picture of a search: predicted change of the outputs against bits, and the chosen point."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from types import ModuleType
from typing import Any

from .ir.errors import MissingExtra, OutputNotWritable
from .search import Found
from .search_allocate import frontier


def draw_picture(found: Found, file: Path) -> Path:
    """Write the picture as PNG; needs the extra `report`.

    The line is the relaxation's frontier, which no allocation can be below; the crosses are one
    format for all weights. Raises MissingExtra, OutputNotWritable.
    """
    figures, canvas = import_matplotlib()
    figure: Any = figures.Figure(figsize=(7.2, 4.6), layout="constrained")
    axes: Any = figure.add_subplot()
    total = sum(each.count for each in found.classes)
    line = frontier([each.choices for each in found.classes])
    axes.plot([s / total for s, _ in line], [c for _, c in line], label="best mixture of formats")
    for name, bits, cost in found.uniform:
        axes.plot(bits, cost, "x", color="0.35")
        axes.annotate(name, (bits, cost), textcoords="offset points", xytext=(5, 4), fontsize=7)
    chosen = f"chosen: {found.bits:.2f} bits, predicted {found.predicted:.3g}"
    axes.plot(found.bits, found.predicted, "o", color="C3", label=chosen)
    if found.measured is not None:
        measured = f"measured on held-out batches: {found.measured:.3g}"
        axes.plot(found.bits, found.measured, "D", color="C2", label=measured)
    axes.set_yscale("log")
    axes.margins(x=0.16)
    axes.set_xlabel("stored bits for one weight of the matmuls, scales included")
    axes.set_ylabel("change of the outputs (KL, nats a position)")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend()
    aside = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        canvas.FigureCanvasAgg(figure).print_png(str(aside), metadata={"Software": "planish"})
        aside.rename(file)
    except OSError as error:
        raise OutputNotWritable(
            "the picture cannot be written",
            where=str(file),
            found=os.strerror(error.errno or 0),
            fix="choose another file with --picture",
        ) from error
    finally:
        aside.unlink(missing_ok=True)
    return file


def check_picture() -> None:
    """Raise MissingExtra now and not after an hour."""
    import_matplotlib()


def import_matplotlib() -> tuple[ModuleType, ModuleType]:
    """The modules figure and backend_agg; raises MissingExtra."""
    try:
        from matplotlib import figure
        from matplotlib.backends import backend_agg
    except ImportError as error:
        raise MissingExtra(
            "the picture needs matplotlib",
            found=str(error),
            fix="pip install 'planish[report]', or leave --picture out",
        ) from error
    return figure, backend_agg


__all__ = ["check_picture", "draw_picture", "import_matplotlib"]
