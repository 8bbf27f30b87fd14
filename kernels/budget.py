"""Hold the kernels' machine code to figures that are checked in, and to rules that always hold.

`python -m planish.kernels.budget NAME...` writes the figures of the named kernels (all without a
name) to budgets.json; `--check` only compares. A figure that grew is a finding until the file says
so: whoever makes a kernel worse says it in the same commit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .figures import Figures, Measured, measure, measure_shipped
from .triton_spec import ARCHS, TritonSpec

FILE = Path(__file__).with_name("budgets.json")

SPARE_REGISTERS = 8
"""Registers are given in units of 8 a thread; fewer than that more is noise of the assembler."""

Budgets = Mapping[str, Figures]


@dataclass(frozen=True)
class Finding:
    """key: kernel | form | config | arch | hints. rule: what is broken; old, new: the figures."""

    key: str
    rule: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.key}: {self.rule}: {self.old} -> {self.new}"


def check(
    spec: TritonSpec, archs: Sequence[str] = ARCHS, budgets: Budgets | None = None
) -> list[Finding]:
    """Compile the kernel for the architectures and compare: with the rules, and with `budgets`
    (those of the file where none are given).
    """
    measured = measure(spec, archs)
    return compare(measured, read() if budgets is None else budgets, [spec.name], archs)


def compare(
    measured: Sequence[Measured], budgets: Budgets, kernels: Iterable[str], archs: Sequence[str]
) -> list[Finding]:
    """What the measured kernels break; budgets of theirs that nothing was measured for, too."""
    new = figures_by_key(measured)
    findings = [finding for one in measured for finding in broken_rules(one)]
    for key, figures in new.items():
        findings += regressions(key, budgets[key], figures) if key in budgets else [_unknown(key)]
    ours = _keys_of(budgets, kernels, archs)
    findings += [
        Finding(key, "no longer compiled", "in the budget", "none") for key in ours - {*new}
    ]
    return findings


def broken_rules(one: Measured) -> list[Finding]:
    """The rules that hold whatever the file says."""
    if one.failure:
        return [Finding(one.entry.key(), "compiles", "expected", one.failure)]
    findings: list[Finding] = []
    amd = one.entry.arch.startswith("gfx")
    for key, figures in one.launches.items():
        if figures.spills or (figures.stack and not amd):
            found = f"{figures.spills} with {figures.stack} bytes of stack"
            findings.append(Finding(key, "registers spilled", "at most 0", found))
        if one.entry.hints and not figures.wide and key not in one.unaligned:
            findings.append(Finding(key, "128-bit loads with hints", "at least 1", "0"))
    kinds = demanded(one.expects, one.entry.arch)
    had = [figures.mma for figures in one.launches.values()]
    if kinds and not any(kind in mma for mma in had for kind in kinds):
        found = ", ".join(f"{n} {kind}" for mma in had for kind, n in mma.items()) or "none"
        key = one.entry.key()
        findings.append(Finding(key, f"{one.expects} in the inner loop", "at least 1", found))
    return findings


def demanded(expects: str, arch: str) -> tuple[str, ...]:
    """The families of which the inner loop must have one, or ().

    sm_80 has no 8-bit floats; those of gfx942 are of another encoding than torch's float8_e4m3fn,
    and gfx1100 has none: there the values are multiplied as 16-bit floats.
    """
    if expects == "fp8 mma":
        if arch.startswith("gfx"):
            return ("fp8 mma", "mma")
        return () if arch in ("sm_80", "sm_86") else ("fp8 mma",)
    return (expects,) if expects else ()


def regressions(key: str, old: Figures, new: Figures) -> list[Finding]:
    """What got worse from the old figures to the new."""
    lost = [kind for kind in old.mma if kind not in new.mma]
    worse = {
        "registers": (old.regs, new.regs, new.regs > old.regs + SPARE_REGISTERS),
        "stack": (old.stack, new.stack, new.stack > old.stack),
        "spills": (old.spills, new.spills, new.spills > old.spills),
        "shared memory": (old.smem, new.smem, new.smem > old.smem),
        "128-bit loads": (old.wide, new.wide, new.wide < old.wide),
        "asynchronous copies": (old.copies, new.copies, new.copies == 0 < old.copies),
        "permutations in the inner loop": (old.prmt, new.prmt, new.prmt > old.prmt),
    }
    findings = [Finding(key, rule, str(a), str(b)) for rule, (a, b, bad) in worse.items() if bad]
    findings += [
        Finding(key, f"{kind} in the inner loop", str(old.mma[kind]), "0") for kind in lost
    ]
    return findings


def update(specs: Iterable[TritonSpec], archs: Sequence[str] = ARCHS, file: Path = FILE) -> None:
    """Write the figures of the kernels as they are now to the file."""
    for spec in specs:
        store(measure(spec, archs), [spec.name], archs, file)


def store(
    measured: Sequence[Measured],
    kernels: Iterable[str],
    archs: Sequence[str] = ARCHS,
    file: Path = FILE,
) -> None:
    """Replace what the file has of the kernels and architectures."""
    budgets = read(file)
    gone = _keys_of(budgets, kernels, archs)
    kept = {key: figures for key, figures in budgets.items() if key not in gone}
    write({**kept, **figures_by_key(measured)}, file)


def read(file: Path = FILE) -> dict[str, Figures]:
    """The budgets by key; none where there is no file yet."""
    if not file.exists():
        return {}
    entries: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return {key: Figures(**values) for key, values in entries.items()}


def write(budgets: Budgets, file: Path = FILE) -> None:
    """One line an entry, sorted, so that a change of one figure is a change of one line."""
    lines = [
        f"{json.dumps(key)}: {json.dumps(figures.to_json(), separators=(',', ':'))}"
        for key, figures in sorted(budgets.items())
    ]
    aside = file.with_suffix(".part")
    aside.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    aside.replace(file)


def figures_by_key(measured: Iterable[Measured]) -> dict[str, Figures]:
    return {key: figures for one in measured for key, figures in one.launches.items()}


def _unknown(key: str) -> Finding:
    return Finding(key, "has no budget", "none", "compiled")


def _keys_of(budgets: Budgets, kernels: Iterable[str], archs: Sequence[str]) -> set[str]:
    names = set(kernels)
    parts = {key: key.split(" | ") for key in budgets}
    return {key for key, p in parts.items() if p[0].split("/")[0] in names and p[3] in archs}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 where a rule is broken, or with --check anything is found."""
    parser = argparse.ArgumentParser(prog="planish.kernels.budget", description=__doc__)
    parser.add_argument("kernels", nargs="*", metavar="NAME")
    parser.add_argument("--arch", action="append", choices=ARCHS)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    asked = parser.parse_args(arguments)
    from .catalog import triton_kernels

    names, archs = asked.kernels or [*triton_kernels()], asked.arch or ARCHS
    measured = measure_shipped(names, archs, asked.processes, lambda s: print(s, file=sys.stderr))
    if asked.check:
        findings = compare(measured, read(), names, archs)
    else:
        store(measured, names, archs)
        findings = [finding for one in measured for finding in broken_rules(one)]
    for finding in findings:
        print(finding)
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
