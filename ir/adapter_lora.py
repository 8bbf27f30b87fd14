"""LoRA and DoRA on every kind of weight, in the order of operations that PEFT rounds in.

LoRA: W + s B A (Hu et al. 2022, sec. 4.1), s = alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023).
DoRA: m / |W + s B A| (W + s B A), norms over the inputs of each output (Liu et al. 2024, eq. 5).
PiSSA, OLoRA: the base lost s B0 A0, factors of itself, before training (Meng et al. 2024, eq. 2-4;
Büyükakyüz 2024, alg. 1), so that what was trained stands beside what was left.
AdaLoRA: W + B diag(E) A, of which training drops directions (Zhang et al. 2023, eq. 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapter_change import Change, Delta, Spot

_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


@dataclass(frozen=True)
class LowRank(Delta):
    """a: [rank, in], or a convolution's [rank, in, ...]; b: [out, rank]. Tables: a [rank, rows]."""

    a: Tensor
    b: Tensor
    scale: float
    flipped: bool = False  # the folder's word on weights [in, out]; the data flow's goes first

    def turned(self, spot: Spot) -> bool:
        """Whether the weight is [in, out], so that B A is added transposed."""
        out, into = int(self.b.shape[0]), int(self.a.shape[1])
        if spot.table and spot.axis is None:
            return True
        if out != into:
            return spot.shape == (into, out)
        return spot.axis == -2 if spot.axis is not None else self.flipped

    def misfit(self, spot: Spot) -> str | None:
        if self.a.shape[0] != self.b.shape[1]:
            return f"ranks differ: A is {list(self.a.shape)}, B {list(self.b.shape)}"
        if len(spot.shape) > 2:
            kernel = (1,) * (len(spot.shape) - 2)
            if self.a.dim() != len(spot.shape) or tuple(self.b.shape[2:]) != kernel:
                return f"A {list(self.a.shape)} and B {list(self.b.shape)} for {list(spot.shape)}"
            shape = (self.b.shape[0], *self.a.shape[1:])
        elif self.a.dim() != 2 or self.b.dim() != 2:
            return f"A is {list(self.a.shape)}, B {list(self.b.shape)}"
        else:
            shape = (self.b.shape[0], self.a.shape[1])
            shape = shape[::-1] if self.turned(spot) else shape
        if tuple(shape) != spot.shape:
            return f"B A is {list(shape)}, but the base's is {list(spot.shape)}"
        return None

    def delta(self, spot: Spot, dtype: torch.dtype) -> Tensor:
        a, b = self.a.to(dtype), self.b.to(dtype)
        if a.dim() == 2:
            product = b @ a
            return (product.t() if self.turned(spot) else product) * self.scale
        if a.dim() == 4 and spot.shape[2:] == (1, 1):
            product = (b[:, :, 0, 0] @ a[:, :, 0, 0])[:, :, None, None]
            return product * self.scale
        # A convolution of the kernels [in, rank, ...] with B is their product by places.
        return _CONVOLUTIONS[a.dim()](a.transpose(0, 1), b).transpose(0, 1) * self.scale


@dataclass(frozen=True)
class AdaptiveRank(Delta):
    """AdaLoRA. a: [rank, in]; b: [out, rank]; values: [rank, 1]; initial: rank before training."""

    a: Tensor
    b: Tensor
    values: Tensor
    scale: float
    initial: float
    flipped: bool = False

    def misfit(self, spot: Spot) -> str | None:
        if tuple(self.values.shape) != (self.a.shape[0], 1):
            return f"E is {list(self.values.shape)} for A {list(self.a.shape)}"
        if len(spot.shape) != 2 or spot.table:
            return "AdaLoRA changes the weight of a linear layer"
        return self._branch().misfit(spot)

    def delta(self, spot: Spot, dtype: torch.dtype) -> Tensor:
        product = self.b.to(dtype) @ (self.a.to(dtype) * self.values.to(dtype))
        product = product.t() if self._branch().turned(spot) else product
        # PEFT keeps the rank in float32 and a small number away from zero.
        return product * self.scale / (torch.tensor([self.initial]) + 1e-5).to(dtype)

    def _branch(self) -> LowRank:
        return LowRank(self.a, self.b, self.scale, self.flipped)


@dataclass(frozen=True)
class Entrywise(Change):
    """HiRA: W + W * (B A), entry by entry (Huang et al. 2025, eq. 4); W before all adapters."""

    branch: LowRank

    def misfit(self, spot: Spot) -> str | None:
        return self.branch.misfit(spot)

    def apply(self, weight: Tensor, base: Tensor, spot: Spot) -> Tensor:
        return weight + base * self.branch.delta(spot, weight.dtype)


@dataclass(frozen=True)
class ExpertLowRank(Delta):
    """A stack's factors: a [experts * rank, in], b [out, rank * experts], experts fastest in b."""

    a: Tensor
    b: Tensor
    scale: float

    def _shapes(self) -> tuple[int, int]:
        return int(self.b.shape[0]), int(self.a.shape[1])

    def misfit(self, spot: Spot) -> str | None:
        out, into = self._shapes()
        experts = spot.shape[0]
        if self.a.shape[0] != self.b.shape[1] or self.a.shape[0] % experts:
            return f"A {list(self.a.shape)} and B {list(self.b.shape)} for {experts} experts"
        if {spot.shape[1:], spot.shape[:0:-1]}.isdisjoint({(out, into)}):
            return f"B A is [{out}, {into}], but an expert's is {list(spot.shape[1:])}"
        return None

    def delta(self, spot: Spot, dtype: torch.dtype) -> Tensor:
        out, into = self._shapes()
        experts = spot.shape[0]
        a = self.a.to(dtype).reshape(experts, -1, into)
        b = self.b.to(dtype).reshape(out, -1, experts)
        straight = spot.axis != -2 if out == into else spot.shape[1:] == (out, into)
        layout = "ore,eri->eoi" if straight else "ore,eri->eio"
        return torch.einsum(layout, b, a) * self.scale


@dataclass(frozen=True)
class Dora(Change):
    """A low-rank change whose result has the norms `magnitude` [out]."""

    branch: LowRank
    magnitude: Tensor

    def misfit(self, spot: Spot) -> str | None:
        wrong = self.branch.misfit(spot)
        outputs = int(self.branch.b.shape[0])
        if wrong is None and self.magnitude.numel() != outputs:
            return f"{self.magnitude.numel()} magnitudes for {outputs} outputs"
        return wrong

    def apply(self, weight: Tensor, base: Tensor, spot: Spot) -> Tensor:
        delta = self.branch.delta(spot, weight.dtype)
        magnitude = self.magnitude.to(weight.dtype).flatten()
        if weight.dim() > 2:
            axes = tuple(range(1, weight.dim()))
            norm = (base + delta).norm(p=2, dim=axes, keepdim=True).transpose(1, 0)
            factor = (magnitude.view_as(norm) / norm).view(-1, *[1] * (weight.dim() - 1))
            return factor * (weight + delta)
        turned = self.branch.turned(spot)
        rows = base.t() + delta.t() if turned else base + delta
        factor = (magnitude / torch.linalg.norm(rows, dim=1)).view(-1, 1)
        return (factor.t() if turned else factor) * (weight + delta)


@dataclass(frozen=True)
class Subtracted(Change):
    """Take the initial factors of PiSSA or OLoRA out of the base, then add the trained ones."""

    branch: LowRank
    init: str

    def misfit(self, spot: Spot) -> str | None:
        if len(spot.shape) != 2 or spot.table:
            return f"{self.init} starts from the factors of a linear layer's weight"
        return self.branch.misfit(spot)

    def apply(self, weight: Tensor, base: Tensor, spot: Spot) -> Tensor:
        turned = self.branch.turned(spot)
        rows = base.t() if turned else base
        rank, scale = int(self.branch.a.shape[0]), self.branch.scale
        if self.init == "olora":
            q, r = torch.linalg.qr(rows)
            b, a = q[:, :rank], r[:rank]
        else:
            u, s, v = torch.linalg.svd(rows, full_matrices=False)
            root = torch.diag(torch.sqrt(s[:rank] / scale))
            b, a = u[:, :rank] @ root, root @ v[:rank]
        taken = scale * b @ a
        left = weight - (taken.t() if turned else taken)
        return left + self.branch.delta(spot, weight.dtype)


__all__ = ["AdaptiveRank", "Dora", "Entrywise", "ExpertLowRank", "LowRank", "Subtracted"]
