"""`planish search`: choose each layer's format under a budget, and write the recipe for it."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_print import check_json_target, progress_bar, show, speaking_plainly, table, write_json


def search(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC", help="A Hugging Face folder, a saved program, a .gguf or a .pt2 file."
        ),
    ],
    calibration: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="A text file, or batches as .safetensors: 0.input_ids, 1.input_ids ...",
        ),
    ],
    budget_bits: Annotated[
        float | None, typer.Option(metavar="B", help="The most bits a weight may take on average.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(metavar="X", help="The most the outputs may change, in nats.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The recipe to write.")] = Path(
        "searched.yaml"
    ),
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A PNG of quality against bits.")
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="The recipe whose quantizing step gets the result.")
    ] = "gptq4",
    formats: Annotated[
        str | None, typer.Option(metavar="F,F,...", help="Candidate formats, comma-separated.")
    ] = None,
    each_weight: Annotated[
        bool,
        typer.Option("--each-weight", help="Let q, k and v differ; they are then not fused."),
    ] = False,
    gradients: Annotated[
        int, typer.Option(metavar="N", help="Batches to measure the layers' weights with.")
    ] = 16,
    held_out: Annotated[
        int, typer.Option(metavar="N", help="Last batches that only measure the result.")
    ] = 4,
    keep: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep what was measured here, and go on from there."),
    ] = None,
    calibration_samples: Annotated[
        int, typer.Option(metavar="N", help="Slices of a calibration text.")
    ] = 36,
    calibration_length: Annotated[
        int, typer.Option(metavar="N", help="Tokens of each slice of a calibration text.")
    ] = 512,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON too.")
    ] = None,
) -> None:
    """Choose each layer's number format under a budget of bits or of quality.

    The result is a recipe for `planish export --recipe`.
    """
    with speaking_plainly():
        check_json_target(json_file)
        _check_out(out, force)
        from .calibration import Slicing
        from .search import FORMATS, Wish

        if picture is not None:
            from .search_picture import check_picture

            check_picture()
        names = tuple(n.strip() for n in formats.split(",")) if formats else FORMATS
        wish = Wish(budget_bits, max_kl, names, recipe, not each_weight, gradients, held_out)
        slicing = Slicing(calibration_samples, calibration_length)
        told = search_model(source, calibration, slicing, wish, out, picture, keep)
        write_json(json_file, told)


def search_model(
    source: Path,
    calibration: Path,
    slicing: Any,
    wish: Any,
    out: Path,
    picture: Path | None,
    keep: Path | None,
) -> dict[str, Any]:
    """Capture, search and write the recipe (and the picture); the result as data."""
    from .api import trace
    from .calibration import calibration_batches
    from .decoder_source import DecoderSource
    from .search import search as run_search

    program = trace(source, kv_cache=True)
    batches = calibration_batches(program, calibration, DecoderSource.of(source), slicing)
    with progress_bar("search") as advance:
        found = run_search(program, batches, wish, folder=keep, progress=advance)
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    aside.write_text(found.recipe.to_yaml(), "utf-8")
    aside.rename(out)
    if picture is not None:
        from .search_picture import draw_picture

        draw_picture(found, picture)
    _show(found, out)
    return {
        "recipe": found.recipe.name,
        "out": str(out),
        "bits": found.bits,
        "predicted": found.predicted,
        "measured": found.measured,
        "exact": found.exact,
        "formats": dict(found.formats),
        "uniform": [list(row) for row in found.uniform],
    }


def _show(found: Any, out: Path) -> None:
    counts = Counter(found.formats.values())
    rows = [[name, str(count)] for name, count in sorted(counts.items())]
    show(table(["format", "weights"], rows, "chosen formats"))
    uniform = [[n, f"{bits:.2f}", f"{cost:.3g}"] for n, bits, cost in found.uniform]
    show(table(["one format for all", "bits", "predicted change"], uniform))
    measured = "" if found.measured is None else f", measured on held-out text {found.measured:.3g}"
    show(
        f"{out}: {found.bits:.2f} bits a weight; predicted change {found.predicted:.3g}{measured}"
        f"{'' if found.exact else ' (perhaps not the best allocation: the search was cut short)'}\n"
        f"planish export SRC --recipe {out} --calibration FILE writes the model"
    )


def _check_out(out: Path, force: bool) -> None:
    from .ir.errors import OutputExists, OutputNotWritable

    if out.suffix not in (".yaml", ".yml") or not out.absolute().parent.is_dir():
        raise OutputNotWritable(
            f"the recipe cannot be written to {out}",
            expected="a file .yaml in a folder that exists",
            found=str(out),
            fix="for example --out searched.yaml",
        )
    if out.exists() and not force:
        raise OutputExists(
            f"the file {out} exists", fix="choose another name with --out, or add --force"
        )


__all__ = ["search", "search_model"]
