"""What came of a fault."""

from __future__ import annotations

from dataclasses import dataclass, field

RAY, HOSTS, ALONE = "on Ray", "on Ray, four hosts", "one process"


@dataclass
class Outcome:
    """What a fault did."""

    fault: str
    how: str
    run: str
    step: int
    """The last on record when it was caused."""
    place: str = RAY
    """Whether it was caused in a run on Ray or in a process that needs none."""
    seconds: float | None = None
    """From the fault to the first new step; None: it did not come."""
    redone: int | None = None
    """Steps that were taken again; None: there is nothing to count."""
    status: int | None = None
    """Exit status of the command, where it ended."""
    wrong: list[str] = field(default_factory=list)
    """What was not as it must be."""

    def line(self) -> str:
        took = "-" if self.seconds is None else f"{self.seconds:.1f} s"
        again = "-" if self.redone is None else str(self.redone)
        came = "; ".join(self.wrong) or "well"
        return f"{self.run:14} {self.fault:42} step {self.step:4}  {took:>8}  redone {again:>3}  {came}"
