"""How the command line speaks: results on stdout, progress and errors on stderr, JSON to a file."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .ir.errors import OutputNotWritable, PlanishError

BAD_INPUT, INTERRUPTED = 2, 130

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def speaking_plainly() -> Generator[None]:
    """Turn our own errors and an interruption into a message and an exit code.

    Anything else is a bug of planish and passes through with its traceback.
    """
    try:
        yield
    except PlanishError as error:
        first, *rest = str(error).split("\n")
        err.print(f"[bold red]error[/] {type(error).__name__}: {escape(first)}")
        for line in rest:
            err.print(escape(line))
        raise typer.Exit(BAD_INPUT) from error
    except KeyboardInterrupt as stop:
        err.print("interrupted; nothing was left half-written")
        raise typer.Exit(INTERRUPTED) from stop


@contextmanager
def progress_bar(what: str) -> Generator[Callable[[int, int, str], None]]:
    """A bar on stderr that goes away when done; yields its `(done, total, name)` callback."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[name]}"),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=None, name="")

        def advance(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, name=name)

        yield advance


@contextmanager
def working(what: str) -> Generator[None]:
    """A spinner on stderr while something of unknown length goes on."""
    if not err.is_terminal:
        yield
        return
    with err.status(what):
        yield


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> Table:
    """A table whose first column is text and whose numbers are aligned to the right."""
    made = Table(title=title or None, title_justify="left", header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(escape(cell) for cell in row))
    return made


def show(table_or_text: Table | str) -> None:
    """Print a result on stdout."""
    out.print(table_or_text, markup=False) if isinstance(table_or_text, str) else out.print(
        table_or_text
    )


def check_json_target(file: Path | None) -> None:
    """Refuse a JSON file that cannot be written before any work is done; OutputNotWritable."""
    if file is None:
        return
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise OutputNotWritable(
            f"the JSON file {file} cannot be written",
            where=str(file),
            expected="a file name in an existing folder",
            found="a folder" if file.is_dir() else f"no folder {file.absolute().parent}",
            fix="create the folder first, or name another file",
        )
    if not os.access(file.absolute().parent, os.W_OK):
        raise OutputNotWritable(
            f"the JSON file {file} cannot be written",
            where=str(file.absolute().parent),
            found="no permission to write there",
            fix="name a file in a folder that you may write to",
        )


def write_json(file: Path | None, data: Any) -> None:
    """Write aside and rename, so that a reader never sees half of it; OutputNotWritable."""
    if file is None:
        return
    aside = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        aside.write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")
        aside.replace(file)
    except OSError as error:
        raise OutputNotWritable(
            f"the JSON file {file} cannot be written", where=str(file), found=str(error)
        ) from error
    finally:
        with suppress(FileNotFoundError):
            aside.unlink()


def megabytes(nbytes: float) -> str:
    """134.5 MB, in units of 10^6 bytes."""
    return f"{nbytes / 1e6:,.1f} MB"
