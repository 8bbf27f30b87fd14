"""C kernels, compiled once for this machine with its own compiler and kept in planish's cache.

No headers of torch or Python are needed, so compiling takes seconds; calls go through ctypes with
the addresses of tensors. OpenMP is the copy that torch has loaded, so that there is one pool of
threads in the process.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from ..ir.read_gguf import cache_folder

_TUNED = ("-mcpu=native",) if platform.machine() in ("aarch64", "arm64") else ("-march=native",)
_FLAGS = ["-O3", "-std=gnu11", "-fPIC", "-shared", "-ffp-contract=fast", "-w"]


@cache
def library(source: str) -> ctypes.CDLL | str:
    """The library of a C file of this folder, or a sentence that says why there is none."""
    compiler = _compiler()
    if compiler is None:
        return "there is no C compiler on this machine (CC, cc, gcc or clang)"
    try:
        return ctypes.CDLL(str(_built(Path(__file__).parent / source, compiler)))
    except (subprocess.SubprocessError, OSError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        return f"{source} could not be compiled: {detail.strip().splitlines()[0][:200]}"


def _compiler() -> list[str] | None:
    """The compiler's command: CC of the environment, or one that is on the path."""
    if chosen := shlex.split(os.environ.get("CC", "")):
        return chosen if shutil.which(chosen[0]) else None
    found = next((path for name in ("gcc", "cc", "clang") if (path := shutil.which(name))), None)
    return [found] if found else None


def _built(source: Path, compiler: list[str]) -> Path:
    """The shared library of `source`, compiled if the cache lacks it for this machine."""
    files = [source, *sorted(source.parent.glob("*.h"))]
    text = b"".join(file.read_bytes() for file in files)
    parts = [*compiler, *_FLAGS, *_TUNED, _version(compiler), _processor(), torch.__version__]
    key = hashlib.sha256(text + "\0".join(parts).encode()).hexdigest()[:16]
    target = cache_folder() / "kernels" / f"{source.stem}-{key}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as aside:
            made = Path(aside) / target.name
            _compile(compiler, source, made)
            made.replace(target)
    return target


def _compile(compiler: list[str], source: Path, target: Path) -> None:
    """For this processor where the compiler can, with threads where OpenMP is to be had."""
    # Compiled with OpenMP, but linked to torch's copy of it: torch has loaded it already.
    threads = ["-fopenmp", f"-L{Path(torch.__file__).parent / 'lib'}"]
    last: subprocess.CalledProcessError | None = None
    for flags in ([*_TUNED, *threads], threads, list(_TUNED), list[str]()):
        command = [*compiler, *_FLAGS, *flags, "-o", str(target), str(source)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            return
        except subprocess.CalledProcessError as error:
            last = error
    assert last is not None
    raise last


def _version(compiler: list[str]) -> str:
    command = [*compiler, "--version"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return told.stdout.partition("\n")[0]


def _processor() -> str:
    """What decides which instructions exist: a cache may be shared by several machines."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return f"{platform.machine()} {platform.processor()}"
    kept = ("flags", "Features", "model name")
    lines = {line for line in info.read_text(errors="replace").splitlines() if line[:10].strip()}
    return "\n".join(sorted(line for line in lines if line.startswith(kept)))
