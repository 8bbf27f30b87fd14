"""Notice that tensors were written since somebody looked: cheaply, on every call.

What is seen: another memory address (`p.data = ...`), a higher version counter (every in-place
operation under autograd's eyes: optimizer steps, `p.add_`, `p.copy_`, `load_state_dict`), and, for
writes that autograd does not count (`p.data.copy_`, writes through NumPy), a change of any of up to
`SAMPLES` evenly spread elements. Not seen: an uncounted write that misses all of those, such as
one to a few rows of a large table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SAMPLES = 64
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Fingerprint:
    """The state of some tensors at one moment. Keeps views of their memory, so it stays theirs."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._marks = [_mark(tensor) for tensor in tensors]
        self._samples = _sampled(tensors)
        self._values = [torch.cat(views) for views in self._samples]

    def changed(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the same tensors, in the same order, are not what they were."""
        for tensor, mark in zip(tensors, self._marks, strict=True):
            if _mark(tensor) != mark:
                return True
        return any(
            not torch.equal(torch.cat(views), values)
            for views, values in zip(self._samples, self._values, strict=True)
        )


def _mark(tensor: Tensor) -> tuple[int, int]:
    """Address and version; tensors made in inference mode have no version."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def _sampled(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Spread views of the tensors' bits, by element size; bits, so that NaN equals NaN."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        word = _WORDS.get(tensor.element_size())
        if word is None or tensor.numel() == 0:
            continue
        groups.setdefault(word, []).append(_spread(tensor.detach().view(word)))
    return list(groups.values())


def _spread(tensor: Tensor) -> Tensor:
    """A one-dimensional view of at most about `SAMPLES` elements, evenly spread in memory."""
    order = sorted(range(tensor.dim()), key=lambda axis: -tensor.stride(axis))
    laid_out = tensor.permute(order)
    if laid_out.is_contiguous():
        flat = laid_out.view(-1)
    else:  # memory with gaps: along the longest axis, at the start of the others
        longest = max(range(tensor.dim()), key=tensor.size)
        flat = tensor[tuple(slice(None) if a == longest else 0 for a in range(tensor.dim()))]
    return flat[:: max(1, -(-flat.numel() // SAMPLES))]
