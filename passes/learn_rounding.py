"""Learn how to round a matrix: offsets of weights and scales of groups, by signed gradients.

Source: SignRound / AutoRound, Cheng et al. 2023, eqs. 3 to 6: q = round(w / s + v) with v within
half a step, s times a learned factor, both moved by the sign of the gradient with a rate that
falls to zero; straight-through gradients. The loss here is the layer's squared error on the
calibration inputs, tr(D H D^T), and its gradient is had in closed form: nothing is run again.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NARROWEST, _WIDEST = 0.5, 1.2


def learn_rounding(
    target: Tensor,
    hessian: Tensor,
    scale: Tensor,
    lowest: Tensor,
    highest: Tensor,
    steps: int,
    rate: float,
) -> tuple[Tensor, Tensor]:
    """The best values and scales met for a matrix `target` [rows, groups, group], float32.

    hessian: [in, in]. scale, and the codes' bounds lowest and highest: [rows, groups, 1]; a value
    is a whole number within its bounds times its scale.
    """
    rows, width = len(target), hessian.shape[0]
    offset = torch.zeros_like(target)
    factor = torch.ones_like(scale)
    best_values, best_scale = target.clone(), scale
    wide = torch.zeros_like(target)
    least = torch.full((rows,), torch.inf)
    for step in range(steps + 1):
        used = scale * factor
        exact = target / used
        wanted = (exact + offset).round_()
        codes = wanted.clamp(lowest, highest)
        values = codes * used
        error = (values - target).flatten(1)[:, :width]
        slope = error @ hessian
        loss = error.mul_(slope).sum(1)
        better = (loss < least)[:, None, None]
        torch.where(better, values, best_values, out=best_values)
        best_scale = torch.where(better, used, best_scale)
        least = torch.minimum(loss, least)
        falling = rate * (1 - step / steps)
        wide.flatten(1)[:, :width] = slope
        inside = wanted.eq_(codes)
        # d values / d offset = scale inside the range; d values / d factor = scale (codes - exact)
        # inside, scale * codes where the range cut the value off.
        on_scale = codes.addcmul_(inside, exact, value=-1).mul_(wide).sum(-1, keepdim=True)
        offset.sub_(wide.mul(inside).mul_(used).sign_(), alpha=falling).clamp_(-0.5, 0.5)
        factor.sub_((on_scale * scale).sign_(), alpha=falling).clamp_(_NARROWEST, _WIDEST)
    return best_values, best_scale
