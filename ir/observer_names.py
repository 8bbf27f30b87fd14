"""Observers by the names that options use."""

from __future__ import annotations

from .errors import UnknownOption
from .observe_token_wise import TokenWise, Weigh
from .observers import Entropy, MinMax, Mse, Observer, Percentile

OBSERVERS = ("minmax", "percentile", "mse", "histogram", "token_wise")


def make_observer(name: str, symmetric: bool, weigh: Weigh, share: float = 0.9999) -> Observer:
    """The observer of that name; raises UnknownOption. weigh: only token_wise asks for it."""
    match name:
        case "minmax":
            return MinMax(symmetric)
        case "percentile":
            return Percentile(symmetric, share)
        case "mse":
            return Mse(symmetric)
        case "histogram":
            return Entropy(symmetric)
        case "token_wise":
            return TokenWise(symmetric, weigh)
        case _:
            raise UnknownOption.named(name, OBSERVERS, where="observers")
