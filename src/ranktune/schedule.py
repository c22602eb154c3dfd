"""Step to number: how a budget moves over a run. Counts are integers throughout, so no rounding loses a component."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CubicPruning:
    """A budget that falls slowly first and fast last (Mao 2024, equation 9 as the authors' code has it).

    With ``t`` optimizer steps done, counted from 1:

        budget(t) = start - (start - target) * (t - begin)^3 // (end - begin)^3      for begin < t < end

    and exactly ``target`` from ``end`` on. This is the opposite of AdaLoRA's cubic, which falls fast first.

    Attributes:
        start, target: the budget before and after, in ranks or in parameters.
        begin, end: the last step before pruning may happen, and the step at which it is complete.
        interval: pruning happens every so many steps after ``begin``, and at ``end``.
    """

    start: int
    target: int
    begin: int
    end: int
    interval: int

    @classmethod
    def over_run(
        cls, start: int, target: int, total_steps: int, warmup_ratio: float, final_ratio: float, interval: int
    ) -> CubicPruning:
        """Place the window in a run: after the first ``warmup_ratio`` of its steps, before the last ``final_ratio``."""
        begin = round(warmup_ratio * total_steps)
        return cls(start, target, begin, total_steps - round(final_ratio * total_steps), interval)

    def budget(self, step: int) -> int:
        """What may remain once ``step`` optimizer steps are done."""
        if step <= self.begin:
            return self.start
        if step >= self.end:
            return self.target
        fallen = (self.start - self.target) * (step - self.begin) ** 3
        return self.start - fallen // (self.end - self.begin) ** 3

    def is_event(self, step: int) -> bool:
        """Whether components are chosen after this step."""
        return step == self.end or (self.begin < step < self.end and (step - self.begin) % self.interval == 0)
