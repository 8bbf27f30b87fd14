"""What the simulator reports: a mistake of the program it executes, or a limit of its own."""

from __future__ import annotations

from ..ir.errors import PlanishError


class SimulationError(PlanishError):
    """Executing PTX came to a point that no correct program reaches, or that planish cannot run."""


class OutOfBounds(SimulationError):
    """An address outside every tensor, outside shared memory, or not a multiple of its width."""


class NotWaitedFor(SimulationError):
    """Data touched while a copy or a matrix instruction that owns it may still be under way."""


class UnsupportedInstruction(SimulationError):
    """An instruction that the simulator does not know."""


class EndlessLoop(SimulationError):
    """The limit of instructions is reached, or threads wait for what nobody will do."""


class Fault(Exception):
    """A mistake found by a part that does not know which instruction it is executing.

    kind: what is raised to the caller once the instruction and the program are known. thread: the
    first one concerned, or None. expected, found: the two sides of the mismatch.
    """

    def __init__(
        self,
        kind: type[SimulationError],
        what: str,
        *,
        thread: int | None = None,
        expected: str = "",
        found: str = "",
    ) -> None:
        super().__init__(what)
        self.kind, self.what, self.thread = kind, what, thread
        self.expected, self.found = expected, found

    def at(self, place: str) -> SimulationError:
        """The error to raise; place: the instruction and the program."""
        who = "" if self.thread is None else f"; thread {self.thread} (warp {self.thread // 32})"
        return self.kind(self.what, where=place + who, expected=self.expected, found=self.found)
