"""How the backend speaks: one warning for each reason, and errors that Dynamo does not wrap."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

from torch._dynamo.exc import ShortenTraceback

from .ir.errors import PlanishError


class FallbackWarning(UserWarning):
    """planish leaves a graph to Inductor, or runs it eagerly."""


def one_line(error: BaseException) -> str:
    """The error's first sentence."""
    if isinstance(error, PlanishError):
        return f"{error.what} ({error.found})" if error.found else error.what
    text = str(error).strip()
    return text.splitlines()[0] if text else repr(error)


def warn_once(reason: str, how: str) -> None:
    """Warn that the graph runs `how`; once for each reason and compiled model."""
    told: set[str] = _compiled_model().__dict__.setdefault("_planish_told", set())
    if reason not in told:
        told.add(reason)
        warnings.warn(f"planish: {reason}: the graph runs {how}", FallbackWarning, stacklevel=2)


class _Anyone:
    """Stands for the compiled model where the backend was not called by torch.compile."""


def _compiled_model() -> object:
    """The object that `torch.compile` made for this backend and model: it is calling us.

    Dynamo tells a backend nothing about the model whose graphs it compiles one by one.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if type(caller).__name__ == "_TorchCompileWrapper":
            return caller
        frame = frame.f_back
    return _Anyone()


class _Unwrapped(ShortenTraceback):
    """Dynamo hands errors of this kind to the user as they are."""

    def __init__(self, error: PlanishError) -> None:
        Exception.__init__(self, str(error))
        self.__dict__.update(error.__dict__)
        self.first_useful_frame = None


def unwrapped(error: PlanishError) -> Exception:
    """The error as one of its own class that Dynamo does not wrap in BackendCompilerFailed."""
    kind = type(error)
    return type(kind.__name__, (_Unwrapped, kind), {"__module__": kind.__module__})(error)
