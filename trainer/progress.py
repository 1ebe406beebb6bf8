"""Where a run stands, and how much of its budget is used up."""

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Budget:
    """The first that is used up ends the run; None = no limit."""

    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None


@dataclass
class Progress:
    """What the clock, the counters and the logs of a run go on from; saved with the resume state."""

    step: int = 0  # updates so far
    samples: int = 0  # rows taken from the stream, over all processes
    tokens: int = 0  # labels trained on
    positions: int = 0  # computed, those without a label too
    seconds: float = 0.0
    skipped: int = 0  # batches without labels, and steps whose loss or gradient was not finite
    next_validation: float = 0.0  # share of the budget at which it is due
    validated_step: int = -1  # at which the last validation was
    window: list[float] = field(default_factory=list)  # losses since the last line of the metrics log
    first_losses: list[float] = field(default_factory=list)  # of ten steps
    last_losses: list[float] = field(default_factory=list)

    def note_loss(self, loss: float) -> None:
        self.window.append(loss)
        if len(self.first_losses) < 10:
            self.first_losses.append(loss)
        self.last_losses = [*self.last_losses[-9:], loss]

    def share(self, budget: Budget, rows: int) -> float:
        """Of the budget that is used up; 1.0 or more ends the run. rows: of one epoch."""
        shares = [0.0]
        if budget.steps is not None:
            shares.append(self.step / max(budget.steps, 1))
        if budget.epochs is not None:
            shares.append(self.samples / max(math.ceil(budget.epochs * rows), 1))
        if budget.minutes is not None:
            shares.append(self.seconds / max(budget.minutes * 60, 1e-9))
        return max(shares)
