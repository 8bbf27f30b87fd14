"""What a search for a fault found: the pass, its one rewrite, the node, the tensor, the numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..ir.errors import PassBroke
from ..ir.verify import WIDE_LIMIT


@dataclass(frozen=True)
class Culprit:
    """A rewrite that makes a program wrong.

    kind: "numbers" (computes something else), "weight" (a LOSSY budget), "malformed" (does not fit
    together). step, spelling: the pass and its options; place, of: its place in the pipeline from
    1. number, rewrites: the rewrite and how many the pass did; number 0 means that the pass is
    wrong with all of its numbered rewrites left out. before, after: readable names of the two
    values; tensor: the type of the new one on the probe. error_before, error_after, allowed,
    wide: see `Deviation` (for a weight, SQNR in dB), measured on the isolated piece.
    """

    kind: str
    step: str
    spelling: str
    place: int
    of: int
    number: int
    rewrites: int
    rule: str = ""
    before: str = ""
    after: str = ""
    module: str = ""
    source: str = ""
    tensor: str = ""
    fidelity: str = ""
    error_before: float = 0.0
    error_after: float = 0.0
    allowed: float = 0.0
    wide: float = 0.0
    nans: int = 0
    text_before: str = ""
    text_after: str = ""
    message: str = ""
    folder: str = ""

    def headline(self) -> str:
        """One sentence: which pass, which rewrite, which value."""
        where = f"pass {self.place} of {self.of}, {self.spelling}," if self.of else self.spelling
        what = {
            "numbers": "changes what the program computes",
            "weight": "breaks its budget",
            "malformed": "leaves a program that does not fit together",
        }[self.kind]
        if not self.number:
            return f"{where} {what}, in an edit that none of its {self.rewrites} rewrites names"
        rule = f" ({self.rule})" if self.rule else ""
        return f"{where} {what} in rewrite {self.number} of {self.rewrites}{rule}"

    def numbers(self) -> str:
        """The measured deviation in one line."""
        if self.kind == "malformed":
            return self.message.splitlines()[0] if self.message else ""
        if self.kind == "weight":
            return f"{self.error_after:.1f} dB SQNR, at least {self.allowed:.1f} dB allowed"
        if self.fidelity == "exact":
            text = f"relative difference {self.error_after:.3g}, the same bits expected"
        else:
            text = (
                f"{self.error_after:.3g} against float64 (before {self.error_before:.3g}, allowed "
                f"{self.allowed:.3g}); float64 runs differ by {self.wide:.3g} "
                f"(allowed {WIDE_LIMIT:.1g})"
            )
        return text + (f"; {self.nans} new NaNs" if self.nans else "")

    def __str__(self) -> str:
        lines = [self.headline()]
        value = (
            f"%{self.after}" if self.after == self.before else f"%{self.before} -> %{self.after}"
        )
        rows = [
            ("value", f"{value} : {self.tensor}" if self.after else ""),
            ("module", (self.module or "the root module") if self.after else ""),
            ("source", _source_text(self.source)),
            ("error", self.numbers()),
        ]
        lines += [f"  {label:<8}{text}" for label, text in rows if text]
        for label, text in (("before", self.text_before), ("after", self.text_after)):
            if text:
                lines += [f"  {label}:", *(f"    {line}" for line in text.splitlines())]
        if self.folder:
            lines.append(f"  reproduce: planish explain {self.folder}")
        return "\n".join(lines)

    def in_folder(self, folder: str) -> Culprit:
        return replace(self, folder=folder)

    def error(self) -> PassBroke:
        """The error to raise for it."""
        reproduce = f"reproduce: planish explain {self.folder}; " if self.folder else ""
        return PassBroke(
            f"{self.headline()}\n" + "\n".join(str(self).splitlines()[1:]),
            where=self.module or "the root module",
            expected=self._expected(),
            found=self.numbers(),
            fix=reproduce + "correct the rule, or run with on_break=rollback to go on without it",
        )

    def _expected(self) -> str:
        if self.kind == "weight":
            return f"at least {self.allowed:.1f} dB; or more bits, smaller groups, or leave it out"
        if self.kind == "malformed":
            return "a well-formed program"
        if self.fidelity == "exact":
            return "the same bits"
        return f"relative error at most {self.allowed:.2g}, float64 runs equal to {WIDE_LIMIT:.1g}"

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def _source_text(source: str) -> str:
    """model.py:41: the code, from the form that Python prints in a traceback."""
    head, _, code = source.partition("\n")
    parts = head.replace('File "', "").replace('"', "").split(", ")
    if len(parts) < 2:
        return source.strip()
    return f"{parts[0]}:{parts[1].removeprefix('line ')}: {code.strip()}"


__all__ = ["Culprit"]
