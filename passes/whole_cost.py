"""What a whole program costs in one measure, before a cut, with a cut planned and after it."""

from __future__ import annotations

from collections.abc import Callable

from ..ir.channel_map import ChannelMap, channel_map
from ..ir.cut_channels import Norms, cut_channels
from ..ir.history import Measured
from ..ir.program import Program
from .choose_units import Choice, Counts
from .contract import Context
from .measure_latency import Latency
from .program_costs import example_call, program_costs


class WholeCost:
    """measure: parameters, flops or latency, of the program as it is now. Raises WrongOrder."""

    def __init__(
        self, measure: str, program: Program, channels: ChannelMap, context: Context
    ) -> None:
        self.measure, self._context = measure, context
        self._tried = 0
        self._latency: Latency | None = None
        self.before = 1.0
        if measure == "latency":
            call = example_call(program, context.calibration)
            self._latency = Latency(program.copy(), call)
        else:
            self.before = self._counted(program, channels)

    def lost(
        self, program: Program, channels: ChannelMap, choice: Choice, norms: Norms
    ) -> Callable[[Counts], float]:
        """What part is gone when units of this program, which may have lost layers, go."""
        latency = self._latency
        if latency is not None:

            def timed(counts: Counts) -> float:
                self._context.progress(min(self._tried, self.steps), self.steps, "latency")
                self._tried += 1
                made = program.copy()
                dead = choice.dead(counts)
                if dead:
                    cut_channels(made, dead, channels=channels, norms=norms)
                return 1 - latency.share(made)

            return timed
        flops = self.measure == "flops"
        costs = program_costs(program, channels, self._context.calibration, flops=flops)
        count = costs.flops if flops else costs.parameters
        return lambda counts: 1 - count(choice.dead(counts)) / self.before

    @property
    def steps(self) -> int:
        """Of a bisection: as many as the measure is exact enough for."""
        return 24 if self._latency is None else 6

    def measured(self, program: Program, budget: float) -> Measured:
        """The record of a program after its cut: the part that stays, of the part allowed to."""
        if self._latency is not None:
            what = f"latency that stays, of that before ({self._latency.told})"
            return Measured(what, 1.0, self._latency.share(program), 1 - budget)
        share = self._counted(program, None) / self.before
        return Measured(f"{self.measure} that stay, of those before", 1.0, share, 1 - budget)

    def _counted(self, program: Program, channels: ChannelMap | None) -> float:
        if self.measure == "parameters":
            return float(program.parameter_count())
        found = channel_map(program) if channels is None else channels
        return program_costs(program, found, self._context.calibration, flops=True).flops()


__all__ = ["WholeCost"]
