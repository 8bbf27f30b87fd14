"""LoHa, LoKr, VeRA and (IA)^3: changes of a weight that are products of another form than B A.

LoHa: (W1a W1b) * (W2a W2b) elementwise (Hyeon-Woo et al. 2022, FedPara, prop. 1). LoKr: W1 (x) W2,
a Kronecker product (Yeh et al. 2024, LyCORIS, sec. 3.1). VeRA: diag(b) B diag(d) A with random B, A
that all layers share (Kopiczko et al. 2024, eq. 2). (IA)^3: outputs, or the inputs of a
feed-forward layer, times a vector (Liu et al. 2022, sec. 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapter_change import Change, Delta, Spot, unlike

_CORE = "ijkl,ip,jr->prkl"  # a core [rank, rank, ...] between two factors of rank rows


@dataclass(frozen=True)
class Hadamard(Delta):
    """LoHa. parts: w1_a [out, rank], w1_b [rank, in], w2_a, w2_b; with cores t1, t2 by rank."""

    parts: Mapping[str, Tensor]
    scale: float

    def _value(self, dtype: torch.dtype) -> Tensor:
        part = {name: value.to(dtype) for name, value in self.parts.items()}
        if "t1" in part:
            one = torch.einsum("ijkl,jr,ip->prkl", part["t1"], part["w1_b"], part["w1_a"])
            two = torch.einsum("ijkl,jr,ip->prkl", part["t2"], part["w2_b"], part["w2_a"])
        else:
            one, two = part["w1_a"] @ part["w1_b"], part["w2_a"] @ part["w2_b"]
        return one * two * torch.tensor(self.scale)

    def misfit(self, spot: Spot) -> str | None:
        return _reshapes(self._value, spot)

    def delta(self, spot: Spot, dtype: torch.dtype) -> Tensor:
        return self._value(dtype).reshape(spot.shape)


@dataclass(frozen=True)
class Kronecker(Delta):
    """LoKr. parts: w1 or w1_a, w1_b; w2, or w2_a, w2_b and perhaps a core t2."""

    parts: Mapping[str, Tensor]
    scale: float

    def _value(self, dtype: torch.dtype) -> Tensor:
        part = {name: value.to(dtype) for name, value in self.parts.items()}
        one = part["w1"] if "w1" in part else part["w1_a"] @ part["w1_b"]
        if "w2" in part:
            two = part["w2"]
        elif "t2" in part:
            two = torch.einsum(_CORE, part["t2"], part["w2_a"], part["w2_b"])
        else:
            two = part["w2_a"] @ part["w2_b"]
        if two.dim() == 4:
            one = one[:, :, None, None]
        return torch.kron(one, two.contiguous()) * self.scale

    def misfit(self, spot: Spot) -> str | None:
        return _reshapes(self._value, spot)

    def delta(self, spot: Spot, dtype: torch.dtype) -> Tensor:
        return self._value(dtype).reshape(spot.shape)


def _reshapes(value: Callable[[torch.dtype], Tensor], spot: Spot) -> str | None:
    try:
        shape = value(torch.float32).shape
    except RuntimeError as error:
        return f"its factors do not fit each other ({str(error).splitlines()[0]})"
    if spot.axis == -2 or spot.table:
        return "is not a weight [out, in] of a linear layer or a convolution"
    # A convolution's factors may be of the kernel laid out flat, [out, in * places].
    flat = (spot.shape[0], math.prod(spot.shape[1:]))
    if tuple(shape) in (spot.shape, flat) or (*spot.shape, 1) == tuple(shape):
        return None
    convolved = len(spot.shape) > 2 and math.prod(shape) == math.prod(spot.shape)
    return None if convolved else unlike(spot, shape)


@dataclass(frozen=True)
class VectorProduct(Delta):
    """VeRA. a: [rank, widest in]; b: [widest out, rank]; d: [rank]; out: [out]; a user's factor."""

    a: Tensor
    b: Tensor
    d: Tensor
    out: Tensor
    factor: float = 1.0
    flipped: bool = False

    def _sizes(self, spot: Spot) -> tuple[int, int]:
        out = int(self.out.shape[0])
        turned = spot.axis == -2 if spot.axis is not None else self.flipped
        return (out, spot.shape[0]) if turned else (out, spot.shape[1])

    def misfit(self, spot: Spot) -> str | None:
        if len(spot.shape) != 2:
            return f"VeRA changes a matrix, the base's is {list(spot.shape)}"
        out, into = self._sizes(spot)
        if (out, into) not in (spot.shape, spot.shape[::-1]):
            return f"{out} outputs, but the base's is {list(spot.shape)}"
        if self.a.shape[0] != self.d.shape[0] or self.b.shape[1] != self.d.shape[0]:
            return f"{self.d.shape[0]} factors for a rank of {self.a.shape[0]}"
        if self.a.shape[1] < into or self.b.shape[0] < out:
            return f"projections of {self.a.shape[1]} and {self.b.shape[0]} are too small"
        return None

    def delta(self, spot: Spot, dtype: torch.dtype) -> Tensor:
        out, into = self._sizes(spot)
        left = self.out.to(dtype).unsqueeze(-1) * self.b[:out].to(dtype)
        right = self.d.to(dtype).unsqueeze(-1) * self.a[:, :into].to(dtype)
        product = left @ right
        turned = spot.axis == -2 if spot.axis is not None else self.flipped
        product = product.t() if turned else product
        return product if self.factor == 1 else product * self.factor


def random_projections(key: int, rank: int, out: int, into: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] of VeRA, drawn as PEFT draws them from a key."""
    generator = torch.Generator().manual_seed(key)

    def drawn(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))  # Kaiming, uniform
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    return drawn(rank, into), drawn(out, rank)


@dataclass(frozen=True)
class Scaled(Change):
    """(IA)^3: the inputs, the outputs or the bias of a layer times a vector."""

    vector: Tensor
    inputs: bool
    flipped: bool = False

    def _axis(self, spot: Spot) -> int:
        if len(spot.shape) == 1:
            return 0
        if len(spot.shape) > 2:
            return 1 if self.inputs else 0
        turned = spot.axis == -2 if spot.axis is not None else self.flipped
        return int(turned) ^ int(self.inputs)

    def misfit(self, spot: Spot) -> str | None:
        size = spot.shape[self._axis(spot)]
        if self.vector.numel() != size:
            return f"{self.vector.numel()} factors for {size} channels of {list(spot.shape)}"
        return None

    def apply(self, weight: Tensor, base: Tensor, spot: Spot) -> Tensor:
        sizes = [1] * weight.dim()
        sizes[self._axis(spot)] = -1
        return torch.mul(weight, self.vector.to(weight.dtype).reshape(sizes))


__all__ = ["Hadamard", "Kronecker", "Scaled", "VectorProduct", "random_projections"]
