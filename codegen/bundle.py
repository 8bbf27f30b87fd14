"""An output folder that appears whole or not at all, with `planish.json` to say what it is."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..ir.errors import OutputExists, OutputNotWritable
from ..ir.program import Program, shape_text
from ..ir.text import dtype_text

MANIFEST = "planish.json"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def write_bundle(
    folder: Path, write: Callable[[Path], Mapping[str, Any]], *, force: bool = False
) -> Path:
    """Let `write` fill a folder beside `folder`, then rename it; returns `folder`.

    write: fills the folder it is given and returns what the manifest tells. With force an
    existing folder is replaced, and stays as it was if anything fails. Whatever ends `write`
    early, an interrupt too, leaves nothing behind. Raises OutputExists, OutputNotWritable.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 (resolve() would follow a link)
    check_output(folder, force)
    made = _make_parents(folder)
    aside: Path | None = None
    try:
        aside = _beside(folder, ".partial")
        told = write(aside)
        manifest = json.dumps({**told, "files": _files(aside)}, indent=2, default=str)
        (aside / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
        aside.chmod(0o777 & ~_umask())
        _put_in_place(aside, folder, force)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise _not_writable(folder, error) from error
    finally:
        if aside is not None and aside.exists():
            shutil.rmtree(aside, ignore_errors=True)
        if not folder.exists():
            _remove_empty(made)
    return folder


def check_output(folder: Path, force: bool) -> None:
    """Refuse a folder that cannot be written before any work is done for it."""
    if folder.exists() and not folder.is_dir():
        raise OutputExists(
            "the output is a file, not a folder",
            where=str(folder),
            fix="choose another folder",
        )
    if folder.exists() and not force:
        raise OutputExists(
            "the output folder exists",
            where=str(folder),
            fix="choose another folder, or allow overwriting with force=True (--force)",
        )
    here = Path.cwd()
    if folder.exists() and (folder in (here, Path.home()) or folder in here.parents):
        raise OutputExists(
            "the output folder holds more than an export: it is the current folder or around it",
            where=str(folder),
            fix="choose another folder",
        )


def _make_parents(folder: Path) -> list[Path]:
    """Create what is missing above `folder`; returns it, innermost first."""
    missing = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(missing)
        raise _not_writable(folder, error) from error
    if not os.access(folder.parent, os.W_OK):
        raise _not_writable(folder, PermissionError(errno.EACCES, "no permission to write"))
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _not_writable(folder: Path, error: OSError) -> OutputNotWritable:
    return OutputNotWritable(
        "the output folder cannot be written",
        where=str(folder),
        found=f"{error.strerror or error}",
        fix="choose a folder on a disk with room, where you may write",
    )


def _put_in_place(aside: Path, folder: Path, force: bool) -> None:
    """Rename; an older folder is kept until the new one stands."""
    if not folder.exists():
        aside.rename(folder)
        return
    check_output(folder, force)  # it may have appeared meanwhile
    old = _beside(folder, ".old")
    kept = old / folder.name
    try:
        folder.rename(kept)
        aside.rename(folder)
    except BaseException:
        if kept.exists() and not folder.exists():
            kept.rename(folder)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _beside(folder: Path, suffix: str) -> Path:
    """A new hidden folder on the same file system, so that a rename is all it takes."""
    return Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=suffix, dir=folder.parent))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of every file, read in pieces."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            name = path.relative_to(folder).as_posix()
            found[name] = {"bytes": path.stat().st_size, "sha256": digest}
    return found


def describe(
    program: Program,
    target: str,
    profile: str,
    options: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> dict[str, Any]:
    """What the manifest tells of an exported program, apart from its files."""
    tensors = [spec for spec in program.input_specs if spec.is_tensor]
    return {
        "planish": planish_version(),
        "target": target,
        "profile": profile,
        "target_options": dict(options),
        **metadata,
        "source": program.metadata.get("source"),
        "parameters": program.parameter_count(),
        "weight_bytes": program.nbytes(),
        "inputs": [
            {
                "name": spec.name,
                "dtype": dtype_text(spec.dtype) if spec.dtype else None,
                "shape": shape_text(spec.shape),
            }
            for spec in tensors
        ],
        "history": program.history.to_json(),
        "versions": _versions(),
    }


def planish_version() -> str:
    """The installed version."""
    try:
        return importlib.metadata.version("planish")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("torch", "transformers", "onnx", "onnx-ir", "onnxruntime"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
