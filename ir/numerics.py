"""Error measures between a reference and its approximation, all computed in float64."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def max_abs_error(reference: Tensor, approximation: Tensor) -> float:
    """Largest |reference - approximation|; 0 for empty tensors, nan if either holds a NaN."""
    error = _difference(reference, approximation)
    return error.abs().max().item() if error.numel() else 0.0


def relative_error(reference: Tensor, approximation: Tensor) -> float:
    """||reference - approximation|| / ||reference|| (Frobenius); inf if only the reference is 0."""
    error = torch.linalg.vector_norm(_difference(reference, approximation)).item()
    size = torch.linalg.vector_norm(reference.double()).item()
    if size == 0:
        return 0.0 if error == 0 else math.inf
    return error / size


def sqnr(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise, 10 log10(sum ref^2 / sum (ref - approx)^2), in dB.

    inf where the two are equal, -inf where only the reference is zero.
    """
    error = relative_error(reference, approximation)
    if error in (0.0, math.inf):
        return math.inf if error == 0 else -math.inf
    return -20 * math.log10(error)


def cosine(reference: Tensor, approximation: Tensor) -> float:
    """Cosine of the angle between the two, seen as vectors; 1 if both are zero, 0 if one is."""
    a, b = reference.double().flatten(), approximation.double().flatten()
    _check(reference, approximation)
    sizes = torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)
    if sizes.item() == 0:
        return 1.0 if torch.equal(a, b) else 0.0
    return (torch.dot(a, b) / sizes).item()


def kl_divergence(logits_reference: Tensor, logits: Tensor) -> float:
    """KL(softmax(reference) || softmax(logits)), mean over positions, in nats.

    Both are [..., vocabulary]; worked through in blocks of positions to bound memory.
    """
    _check(logits_reference, logits)
    size = logits.shape[-1]
    total, count = 0.0, logits.numel() // size
    pairs = zip(
        logits_reference.reshape(-1, size).split(_positions(size)),
        logits.reshape(-1, size).split(_positions(size)),
        strict=True,
    )
    for reference, other in pairs:
        log_p = F.log_softmax(reference.double(), dim=-1)
        log_q = F.log_softmax(other.double(), dim=-1)
        # A token that the reference rules out (-inf) adds nothing, whatever the other thinks.
        gain = torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q))
        total += gain.sum().item()
    return total / count


def perplexity(logits: Tensor, ids: Tensor) -> float:
    """exp of the mean negative log likelihood of each next token.

    logits [..., length, vocabulary], ids [..., length] integers: position t predicts id t+1.
    """
    if logits.shape[:-1] != ids.shape or ids.shape[-1] < 2:
        raise ValueError(f"logits {list(logits.shape)} do not fit ids {list(ids.shape)}")
    size = logits.shape[-1]
    predicted = logits[..., :-1, :].reshape(-1, size).split(_positions(size))
    targets = ids[..., 1:].reshape(-1).split(_positions(size))
    total = sum(
        F.cross_entropy(block.double(), target, reduction="sum").item()
        for block, target in zip(predicted, targets, strict=True)
    )
    return math.exp(total / ids[..., 1:].numel())


def _positions(vocabulary: int) -> int:
    return max(1, (1 << 23) // vocabulary)


def _check(reference: Tensor, approximation: Tensor) -> None:
    if reference.shape != approximation.shape:
        raise ValueError(f"shapes differ: {list(reference.shape)}, {list(approximation.shape)}")


def _difference(reference: Tensor, approximation: Tensor) -> Tensor:
    _check(reference, approximation)
    return reference.double() - approximation.double()
