"""What a failed export means, in the user's terms: which line of the model, why, what to do."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

from .errors import CaptureFailed


def capture_failed(model: torch.nn.Module, error: BaseException) -> CaptureFailed:
    """The error to raise for a failed export: the model's source line, the reason, a remedy."""
    frame = _user_frame(error)
    text = str(error).strip()
    first = text.splitlines()[0] if text else repr(error)
    dependent = "data-dependent" in text or "Eq(u" in text or "GuardOnDataDependent" in repr(error)
    return CaptureFailed(
        f"{type(model).__qualname__} could not be exported to a graph",
        where=frame,
        expected="control flow that does not depend on the values of tensors"
        if dependent
        else "a model that torch.export accepts",
        found=first,
        fix="replace the branch on tensor values by torch.where or torch.cond, or capture the part "
        "of the model around it"
        if dependent
        else "see the chained torch.export error; pass dynamic_shapes if an axis must be fixed",
    )


def _user_frame(error: BaseException) -> str:
    """The innermost source line outside of torch and planish, in the chain of causes."""
    own = str(Path(__file__).parent.parent)
    places: list[str] = []
    seen: BaseException | None = error
    while seen is not None:
        places += [
            f"{frame.filename}:{frame.lineno}: {frame.line}"
            for frame in traceback.extract_tb(seen.__traceback__)
            if "/torch/" not in frame.filename and str(Path(frame.filename).parent.parent) != own
        ]
        seen = seen.__cause__ or seen.__context__
    lines = str(error).splitlines()
    for place, line in enumerate(lines):  # a non-strict trace tells the place in its message only
        if 'File "' in line and "/torch/" not in line:
            code = lines[place + 1].strip() if place + 1 < len(lines) else ""
            places.append(f"{line.strip()}: {code}")
    return places[-1] if places else ""
