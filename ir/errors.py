"""One exception class per mistake; each names what, where, expected, found and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PlanishError(Exception):
    """Base of every error that planish raises on purpose.

    what: one sentence; where: the node and its source module, or the file; expected, found: the
    two sides of the mismatch; fix: what the reader can do.
    """

    def __init__(
        self, what: str, *, where: str = "", expected: str = "", found: str = "", fix: str = ""
    ) -> None:
        self.what, self.where = what, where
        self.expected, self.found, self.fix = expected, found, fix
        lines = [what]
        for label, text in (
            ("where", where),
            ("expected", expected),
            ("found", found),
            ("what to do", fix),
        ):
            if text:
                lines.append(f"  {label}: {text}")
        super().__init__("\n".join(lines))


def nearest(name: str, known: Iterable[str]) -> str:
    """'did you mean X? known: ...' for error messages."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return (f"did you mean {' or '.join(close)}? " if close else "") + f"known: {listed}"


class UnknownName(PlanishError):
    """A name that is not in a list of known ones."""

    kind = "name"

    @classmethod
    def named(cls, name: str, known: Iterable[str], where: str = "") -> UnknownName:
        return cls(f"unknown {cls.kind} {name!r}", where=where, fix=nearest(name, known))


class UnknownWeight(UnknownName):
    kind = "weight"


class UnknownPass(UnknownName):
    kind = "pass"


class UnknownRecipe(UnknownName):
    kind = "recipe"


class UnknownOption(UnknownName):
    kind = "option"


class UnknownTarget(UnknownName):
    kind = "target"


class UnknownFormat(UnknownName):
    kind = "number format"


class WrongOption(PlanishError):
    """An option's value has the wrong type or range."""


class WrongInput(PlanishError):
    """A call's arguments do not fit the program, or example inputs do not fit the model."""


class TextTooLong(PlanishError):
    """A text, with what shall be added to it, exceeds the context of the model or of its cache."""


class CaptureFailed(PlanishError):
    """The model could not be exported to a graph."""


class StatefulModel(CaptureFailed):
    """The model changes a buffer or an input while it runs, so it is not a function."""


class NonFiniteWeight(PlanishError):
    """A weight holds NaN or infinity."""


class NonFiniteActivation(PlanishError):
    """A value becomes NaN or infinite on a calibration batch."""


class CalibrationTooSmall(PlanishError):
    """No calibration batches, or batches that measure nothing."""


class UnsupportedGroupSize(PlanishError):
    """A group size that the layer's width, the format or the target cannot serve."""


class UnsupportedFormat(PlanishError):
    """A number format that a method or a caller asks for something it does not have."""


class WrongOrder(PlanishError):
    """A pass requires a fact that does not hold at its place in the recipe."""


class FactBroken(PlanishError):
    """A pass ensured a fact that its checker refutes."""


class PassBroke(PlanishError):
    """A pass left a program that is malformed or computes something else."""


class PatternError(PlanishError):
    """A rewrite's pattern, condition or replacement is written wrongly."""


class OutputExists(PlanishError):
    """The output folder exists and overwriting was not asked for."""


class OutputNotWritable(PlanishError):
    """The output folder cannot be written."""


class UnsupportedByTarget(PlanishError):
    """A target has no way to express an operation or a format."""


class ScaleOverflow(PlanishError):
    """A group's scale is too large for the format's scale dtype."""


class UnsupportedShape(PlanishError):
    """A tensor's shape that a format or a packed layout cannot hold."""


class SourceNotFound(PlanishError):
    """A model's file or folder does not exist, or lacks a file it cannot do without."""


class CorruptFile(PlanishError):
    """A file is damaged or is not of the kind its name says."""


class TruncatedFile(CorruptFile):
    """A file ends before the data that its own header announces."""


class MissingShard(CorruptFile):
    """An index names a shard that is not there."""


class MissingTensor(PlanishError):
    """A checkpoint lacks a tensor that its configuration or its index asks for."""


class TensorMismatch(PlanishError):
    """A checkpoint's tensor has another shape than the configuration asks for."""


class PickleRefused(PlanishError):
    """Weights offered as a pickle: reading one runs whatever code it holds."""


class OperatorRefused(PlanishError):
    """A saved program names an operator that is unknown, or that does more than compute."""


class UnsupportedCheckpoint(PlanishError):
    """A model on disk of a kind that planish does not read."""


class MissingExtra(PlanishError):
    """An optional dependency is not installed."""
