"""The second moments of a matmul's input, H = mean of x x^T: what its weights' errors cost.

A weight error D [rows, in] changes the outputs by D x, on average over the tokens by
|D x|^2 = tr(D H D^T). Up to a factor, H is the Hessian of the layer's squared error (Hassibi &
Stork 1993; Frantar et al. 2023, eq. 1).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_BLOCK = 128
_ENOUGH = 0.005
"""Damping that outweighs the rounding of float32 sums, so that no factor needs to be tried."""


class Hessian:
    """Sums x x^T over tokens, float32 [in, in]; only its upper block triangle is computed."""

    def __init__(self, width: int) -> None:
        self.sum = torch.zeros(width, width)
        self.tokens = 0

    def add(self, rows: Tensor) -> None:
        """Add activations [tokens, in]."""
        rows = rows.float()
        for start in range(0, rows.shape[1], _BLOCK):
            stop = start + _BLOCK
            self.sum[start:stop, start:].addmm_(rows[:, start:stop].t(), rows[:, start:])
        self.tokens += rows.shape[0]

    def mean(self) -> Tensor:
        """H, float32 [in, in], symmetric."""
        upper = self.sum.triu()
        return (upper + upper.triu(1).t()).div_(max(self.tokens, 1))


def cross_moment(left: Iterable[Tensor], right: Iterable[Tensor], width: int) -> Tensor:
    """The mean of (y - x) x^T over the tokens of y in `left` and x in `right`, [in, in]."""
    total, tokens = torch.zeros(width, width), 0
    for y, x in zip(left, right, strict=True):
        total.addmm_((y - x).float().t(), x.float())
        tokens += x.shape[0]
    return total.div_(max(tokens, 1))


def damped(hessian: Tensor, damp: float) -> tuple[Tensor, str]:
    """H with `damp` times its mean diagonal added, as far as a Cholesky factor needs it.

    Channels that are always zero get a one on their diagonal. The damping grows tenfold until the
    factor exists; the sentence says what was unusual, or "".
    """
    wide = hessian.double().clone()
    diagonal = wide.diagonal()
    dead = diagonal <= 0
    said = f"{int(dead.sum())} dead input channels" if bool(dead.any()) else ""
    scale = float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
    wide.diagonal().add_(dead.double() * scale)
    used = damp
    while True:
        tried = wide.clone()
        tried.diagonal().add_(used * scale)
        if used >= _ENOUGH or int(torch.linalg.cholesky_ex(tried).info) == 0:
            break
        used = max(used * 10, 1e-8)
    if used != damp:
        said += f"{', ' if said else ''}singular Hessian, damped by {used:g} of its mean diagonal"
    return tried, said


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular U with H^-1 = U^T U, float64, of a positive definite H [in, in].

    Row i of U, divided by its diagonal, says how the columns after i make up best for an error in
    column i (Frantar et al. 2023, sec. 3.3, step 3). From the factor of H read backwards:
    H = R R^T with R upper triangular, so U = R^-1, which never inverts H itself.
    """
    backwards = torch.linalg.cholesky(hessian.double().flip(0, 1))
    return _inverse_upper(backwards.flip(0, 1))


def _inverse_upper(matrix: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix, by halves: mostly products."""
    size = len(matrix)
    if size <= _BLOCK:
        one = torch.eye(size, dtype=matrix.dtype)
        return torch.linalg.solve_triangular(matrix, one, upper=True)
    at = size // 2
    result = torch.zeros_like(matrix)
    result[:at, :at] = _inverse_upper(matrix[:at, :at])
    result[at:, at:] = _inverse_upper(matrix[at:, at:])
    result[:at, at:] = -(result[:at, :at] @ matrix[:at, at:]) @ result[at:, at:]
    return result


def output_error(error: Tensor, hessian: Tensor) -> Tensor:
    """tr(D H D^T) by rows: the mean squared error of each output, [rows]."""
    return (error @ hessian).mul_(error).sum(-1)
