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


@dataclass(frozen=True)
class GrowthSchedule:
    """When components are added (Zhang 2023, section 4 of the authors' allocator).

    With ``t`` the optimizer step counted from 0, a round is held at every multiple of ``interval`` above ``warmup``,
    strictly: with both at 100, the first is at t = 200.

    Attributes:
        warmup: no round up to and including this step.
        interval: steps between two rounds.
        total_steps: the run has steps 0 to total_steps - 1.
        window: scores are taken on so many steps up to each round, the round's own among them; None is every step.
    """

    warmup: int
    interval: int
    total_steps: int
    window: int | None = None

    def is_event(self, step: int) -> bool:
        """Whether step t holds a round."""
        return step > self.warmup and step % self.interval == 0

    def rounds_before(self, step: int) -> int:
        """How many rounds are held at steps below ``step``."""
        return max(0, (step - 1) // self.interval - self.warmup // self.interval)

    def rounds_from(self, step: int) -> int:
        """How many rounds the run still holds at ``step`` and later."""
        return self.rounds_before(self.total_steps) - self.rounds_before(step)

    def is_scored(self, step: int) -> bool:
        """Whether step t is in the window before some round of the run."""
        next_round = max(-(-step // self.interval), self.warmup // self.interval + 1) * self.interval
        return next_round < self.total_steps and (self.window is None or next_round - step < self.window)
