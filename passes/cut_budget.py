"""How much of each kind must go so that the whole program loses a given part of what it costs.

One factor on the shares of all kinds is found by bisection. Where a kind goes in large steps (a
head of every layer at once), the part is met with fewer of it and more of a finer one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..ir.errors import PlanishError
from ..ir.prunable_units import Kind
from .choose_units import Choice, Counts

MEASURES = ("parameters", "flops", "latency")
Lost = Callable[[Counts], float]
"""What part of the whole cost is gone when so many units of each place go."""


class BudgetNotReached(PlanishError):
    """Cutting all that may be cut does not lose what was asked for."""


def counts_for_budget(
    choice: Choice, ratios: Mapping[Kind, float], budget: float, lost: Lost, *, steps: int = 24
) -> Counts:
    """The numbers that go, with the least loss that is `budget` or more.

    ratios: how the shares of the kinds are to each other, more than 0. steps: of the bisection; the
    factor is known to 2^-steps. Raises BudgetNotReached.
    """
    search = _Search(choice, ratios, lost, steps)
    most = search.most
    if search.lost(most, {}) < budget:
        raise BudgetNotReached(
            f"the program cannot lose {budget:g} of its cost by cutting {', '.join(ratios)}",
            expected=f"a budget of at most {search.lost(most, {}):.4g} "
            "(one unit of each place stays)",
            found=f"{budget:g}",
            fix="allow more kinds, layers or experts to go, or ask for less",
        )
    factor = search.least(budget, {})
    met = [search.counts(factor, {})]
    just_below = factor - search.width
    for kind in ratios if steps >= 16 and len(ratios) > 1 else ():
        held: dict[Kind, float] = {kind: max(just_below, 0.0)}
        if search.lost(most, held) >= budget:
            met.append(search.counts(search.least(budget, held), held))
    return min(met, key=search.cost)


class _Search:
    """The loss as a function of one factor; each set of numbers is looked at once."""

    def __init__(
        self, choice: Choice, ratios: Mapping[Kind, float], lost: Lost, steps: int
    ) -> None:
        top = max(ratios.values())
        self.ratios: dict[Kind, float] = {kind: ratio / top for kind, ratio in ratios.items()}
        self.choice, self._lost, self.steps = choice, lost, steps
        self.most = 1 / min(self.ratios.values())
        self.width = self.most / 2**steps
        self.seen: dict[tuple[int, ...], float] = {}

    def counts(self, factor: float, held: Mapping[Kind, float]) -> Counts:
        """held: kinds whose factor is another one."""
        shares: dict[Kind, float] = {
            kind: min(held.get(kind, factor) * ratio, 1.0) for kind, ratio in self.ratios.items()
        }
        return self.choice.counts(shares)

    def cost(self, counts: Counts) -> float:
        key = tuple(counts.values())
        if key not in self.seen:
            self.seen[key] = self._lost(counts)
        return self.seen[key]

    def lost(self, factor: float, held: Mapping[Kind, float]) -> float:
        return self.cost(self.counts(factor, held))

    def least(self, budget: float, held: Mapping[Kind, float]) -> float:
        """The least factor that loses the budget; the largest one is known to."""
        low, high = 0.0, self.most
        for _ in range(self.steps):
            middle = (low + high) / 2
            if self.lost(middle, held) >= budget:
                high = middle
            else:
                low = middle
        return high


__all__ = ["MEASURES", "BudgetNotReached", "counts_for_budget"]
