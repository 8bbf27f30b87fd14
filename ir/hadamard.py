"""Orthogonal matrices of a given size: Hadamard where one is known, random otherwise.

Sylvester 1867 doubles a Hadamard matrix; Paley 1933 makes one of order q + 1 for a prime q = 3 mod
4 and of order 2 (q + 1) for a prime q = 1 mod 4; the Kronecker product of two is one again.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(size: int) -> Tensor | None:
    """A matrix of 1 and -1, float64 [size, size], with H H^T = size I; None if none is known here.

    2^k times 1, 12, 20, 28, 36, 44, 60, ...: among others 64, 576, 768, 1536, 2048, 3584, 5120.
    """
    doublings = 0
    while size % 2 == 0 and _paley(size) is None and size > 1:
        size //= 2
        doublings += 1
    core = torch.ones(1, 1, dtype=torch.float64) if size == 1 else _paley(size)
    return None if core is None else torch.kron(core, _sylvester(doublings))


def rotation(size: int, generator: torch.Generator, random: bool = False) -> tuple[Tensor, str]:
    """An orthogonal matrix, float64 [size, size], and what it is in a few words.

    A Hadamard matrix with random signs (Ashkboos et al. 2024, sec. 3), where there is none of the
    size the Kronecker product of a random one and a power of two; `random`: of Gaussian numbers.
    """
    core = None if random else hadamard(size)
    if core is not None:
        signs = torch.randint(0, 2, (size, 1), generator=generator).double() * 2 - 1
        return signs * core / size**0.5, "Hadamard with random signs"
    if random or size % 2:
        return _random(size, generator), "random orthogonal"
    power = size & -size
    doubled = _sylvester(power.bit_length() - 1) / power**0.5
    made = torch.kron(_random(size // power, generator).contiguous(), doubled)
    return made, f"random orthogonal of {size // power} times Hadamard of {power}"


def _random(size: int, generator: torch.Generator) -> Tensor:
    """Uniform among orthogonal matrices: Q of a Gaussian matrix, R's diagonal made positive."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def _sylvester(doublings: int) -> Tensor:
    made = torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    for _ in range(doublings):
        made = torch.kron(made, pair)
    return made


def _paley(size: int) -> Tensor | None:
    if size >= 4 and size % 4 == 0:
        if _is_prime(size - 1):
            return _paley_one(size - 1)
        if size % 8 == 4 and _is_prime(size // 2 - 1):
            return _paley_two(size // 2 - 1)
    return None


def _is_prime(number: int) -> bool:
    return number > 2 and all(number % d for d in range(2, int(number**0.5) + 1))


def _residues(q: int) -> Tensor:
    """chi(i - j), float64 [q, q]: 0, 1 for squares modulo q, -1 for others."""
    chi = torch.full((q,), -1.0, dtype=torch.float64)
    chi[torch.arange(1, q).square() % q] = 1
    chi[0] = 0
    place = torch.arange(q)
    return chi[(place[:, None] - place) % q]


def _bordered(q: int, corner: float) -> Tensor:
    made = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    made[0, 1:], made[1:, 0] = 1, corner
    made[1:, 1:] = _residues(q)
    return made


def _paley_one(q: int) -> Tensor:
    """q = 3 mod 4: order q + 1."""
    return _bordered(q, -1) + torch.eye(q + 1, dtype=torch.float64)


def _paley_two(q: int) -> Tensor:
    """q = 1 mod 4: order 2 (q + 1)."""
    on = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    off = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(_bordered(q, 1), on) + torch.kron(torch.eye(q + 1, dtype=torch.float64), off)
