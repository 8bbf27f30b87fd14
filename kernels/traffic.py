"""Memory traffic of the executed cases, held to figures that are checked in.

Counted by rung 4 for the shapes of a case: wavefronts of shared memory (more than the ideal number
are bank conflicts) and 32-byte sectors of global memory, once for every instruction of a warp.
`python -m planish.kernels.traffic NAME...` writes the figures of the named kernels (all without a
name) to traffic.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .triton_spec import TritonSpec

FILE = Path(__file__).with_name("traffic.json")
COUNTS = ("shared wavefronts", "shared wavefronts at best", "sectors read", "sectors written")
_HELD = ("shared wavefronts", "sectors read", "sectors written")
ARCHS = ("sm_80", "sm_90")

Traffic = Mapping[str, tuple[int, ...]]


def key_of(spec: TritonSpec, case: str, arch: str) -> str:
    """By the operator, so that a kernel of somebody else has figures of its own, or none."""
    return " | ".join((spec.operator, case, arch))


def grown(key: str, counts: Mapping[str, int], file: Path = FILE) -> str | None:
    """What a case moves more than its figures allow, with both; None where there are none."""
    known = read(file).get(key)
    if known is None:
        return None
    old = dict(zip(COUNTS, known, strict=True))
    worse = [f"{name} {old[name]} -> {counts[name]}" for name in _HELD if counts[name] > old[name]]
    return f"more memory traffic than its budget: {', '.join(worse)}" if worse else None


@functools.cache
def read(file: Path = FILE) -> Traffic:
    """The figures by key; none where there is no file yet."""
    if not file.exists():
        return {}
    found: dict[str, list[int]] = json.loads(file.read_text(encoding="utf-8"))
    return {key: tuple(counts) for key, counts in found.items()}


def store(figures: Mapping[str, Mapping[str, int]], file: Path = FILE) -> None:
    """Replace what the file has of the operators of these figures; a line each, sorted."""
    read.cache_clear()
    operators = {key.split(" | ")[0] for key in figures}
    kept = {k: list(v) for k, v in read(file).items() if k.split(" | ")[0] not in operators}
    made = {k: [counts[name] for name in COUNTS] for k, counts in figures.items()}
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted({**kept, **made}.items())]
    aside = file.with_suffix(".part")
    aside.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    aside.replace(file)
    read.cache_clear()


def measured(spec: TritonSpec, archs: Sequence[str] = ARCHS) -> dict[str, dict[str, int]]:
    """Execute every case of a kernel; cases that fail have no figures."""
    from .ladder_execute import run_case

    found: dict[str, dict[str, int]] = {}
    for case in spec.cases:
        for arch in (arch for arch in case.archs if arch in archs and "ptx" in case.rungs):
            ran = run_case(spec, case, arch)
            if ran.verdict.right:
                found[key_of(spec, case.name, arch)] = ran.counts
    return found


def main(arguments: Iterable[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="planish.kernels.traffic", description=__doc__)
    parser.add_argument("kernels", nargs="*", metavar="NAME")
    asked = parser.parse_args(None if arguments is None else list(arguments))
    from .catalog import triton_kernels

    known = triton_kernels()
    for name in asked.kernels or known:
        figures = measured(known[name])
        store(figures)
        print(f"{name}: {len(figures)} executions", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
