"""Second moments of a matmul's input beside the input it once had: what least squares needs.

For the input x as it is now and y as it was, [in] each, over all tokens: H = mean of x x^T,
X = mean of (y - x) x^T, and both means. From these follows the weight that makes of x the outputs
that another weight made of y.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class PairedMoments:
    """Sums over tokens, float32 [in, in] and float64 [in]; the same data gives the same bits."""

    def __init__(self, width: int) -> None:
        self.square, self.cross = torch.zeros(width, width), torch.zeros(width, width)
        self.now, self.gap = torch.zeros(width).double(), torch.zeros(width).double()
        self.owed: Tensor | float = 0.0
        self.owed_mean: Tensor | float = 0.0
        self.tokens = 0

    def add(self, now: Tensor, before: Tensor | None = None, owed: Tensor | None = None) -> None:
        """Add inputs [tokens, in] and what they were before; None: the same.

        owed [tokens, out]: what the outputs shall make up for besides.
        """
        now = now.float()
        if owed is not None:
            self.owed = self.owed + owed.float().t() @ now
            self.owed_mean = self.owed_mean + owed.double().sum(0)
        self.square.addmm_(now.t(), now)
        self.now += now.double().sum(0)
        if before is not None:
            gap = before.float() - now
            self.cross.addmm_(gap.t(), now)
            self.gap += gap.double().sum(0)
        self.tokens += len(now)

    def joined(self, other: PairedMoments) -> PairedMoments:
        """The moments of the tokens of both."""
        made = PairedMoments(len(self.now))
        made.square, made.cross = self.square + other.square, self.cross + other.cross
        made.now, made.gap = self.now + other.now, self.gap + other.gap
        made.owed = self.owed + other.owed
        made.owed_mean = self.owed_mean + other.owed_mean
        made.tokens = self.tokens + other.tokens
        return made

    def rows(self, chosen: Tensor) -> PairedMoments:
        """The moments of some outputs only, int64 [chosen]; inputs are shared, not copied."""
        made = PairedMoments(0)
        made.square, made.cross, made.now, made.gap = self.square, self.cross, self.now, self.gap
        made.owed = self.owed[chosen] if isinstance(self.owed, Tensor) else self.owed
        held = self.owed_mean
        made.owed_mean = held[chosen] if isinstance(held, Tensor) else held
        made.tokens = self.tokens
        return made

    def error(self, weight: Tensor, other: Tensor, centred: bool) -> float:
        """The mean square of what outputs of `other` on x lack of W y and of what is owed, without
        what does not hang on `other`. weight, other: [out, in]; centred: a bias takes the mean."""
        square, cross, owed = self._per_token(centred)
        change = other - weight.double()
        wanted = weight.double() @ cross + owed
        return float((change @ square * change).sum() - 2 * (change * wanted).sum())

    def _per_token(self, centred: bool) -> tuple[Tensor, Tensor, Tensor | float]:
        """H, X and what is owed [out, in] (0.0: nothing) for a token, float64."""
        count = max(self.tokens, 1)
        mean_now, mean_gap = self.now / count, self.gap / count
        square, cross = self.square.double() / count, self.cross.double() / count
        owed, owed_mean = self.owed / count, self.owed_mean / count
        if centred:
            if isinstance(owed_mean, Tensor):
                owed = owed - owed_mean[:, None] * mean_now
            square -= mean_now[:, None] * mean_now
            cross -= mean_gap[:, None] * mean_now
        return square, cross, owed.double() if isinstance(owed, Tensor) else owed

    def solved(self, weight: Tensor, dead: Tensor, damp: float, centred: bool) -> Solved:
        """The weight whose `dead` inputs are zero and whose outputs on x are nearest to W y.

        weight: [out, in]; dead: bool [in]; damp: what is added to the diagonal of the kept inputs'
        moments, as a part of each one's own; it holds the answer to the weight as it was. centred:
        a bias is free to change too. With K the kept inputs and D the dead ones,
        |(W_K + A) x_K - W y|^2 is least at A = (W_D H_DK + W X_K) H_KK^-1.
        """
        wide, kept = weight.double(), ~dead
        square, cross, owed = self._per_token(centred)
        pull = wide[:, dead] @ square[dead][:, kept] + wide @ cross[:, kept]
        if isinstance(owed, Tensor):
            pull += owed[:, kept]
        factor, used = _factor(square[kept][:, kept], damp)
        result = torch.zeros_like(wide)
        result[:, kept] = wide[:, kept] + torch.cholesky_solve(pull.t(), factor).t()
        shift = wide.new_zeros(len(wide))
        if centred:
            count = max(self.tokens, 1)
            gap, now, owed_mean = self.gap / count, self.now / count, self.owed_mean / count
            shift = wide @ gap + (wide - result) @ now + owed_mean
        return Solved(result, shift, used)


@dataclass(frozen=True)
class Solved:
    """weight: float64 [out, in]; shift: the bias gains it, float64 [out]; damp: as it was used."""

    weight: Tensor
    shift: Tensor
    damp: float


def _factor(square: Tensor, damp: float) -> tuple[Tensor, float]:
    """The Cholesky factor with `damp` of the diagonal added, tenfold until there is one.

    Inputs are first brought to one size: an outlier's square would drown the others. An input that
    is always zero gets a one, so its column stays as it was. The least damping outweighs the
    rounding of float32 moments: inputs that say the same would otherwise share by chance.
    """
    damp = max(damp, len(square) * torch.finfo(torch.float32).eps)
    diagonal = square.diagonal().clamp_min(0).clone()
    size = torch.where(diagonal > 0, diagonal.sqrt(), 1.0)
    even = square / size[:, None] / size
    even.diagonal()[diagonal <= 0] = 1.0
    while True:
        tried = even.clone()
        tried.diagonal().add_(damp)
        factor, failed = torch.linalg.cholesky_ex(tried)
        if not int(failed):
            return factor * size[:, None], damp
        damp *= 10


__all__ = ["PairedMoments", "Solved"]
