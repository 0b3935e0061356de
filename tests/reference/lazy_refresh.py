"""Q-GaLore's layer-adaptive schedule, arXiv:2407.08296 section 3.2, with an emptied queue and a bounded gap."""

from __future__ import annotations


class LazySchedule:
    """Written forwards: the step of the next refresh is known, and moves when one is made."""

    def __init__(self, *, gap, threshold, window, growth, longest, offset=0):
        self.first, self.threshold, self.window, self.growth, self.longest = (
            gap,
            threshold,
            window,
            growth,
            longest,
        )
        self.gap, self.times_grown, self.queue = gap, 0, []
        self.next, self.last = 1 + offset, None

    def is_due(self, step):
        return step in (1, self.next)

    def refreshed(self, step, similarity):
        """`similarity` of the basis made at `step` with the one before; None where there was none."""
        served = None if self.last is None else step - self.last
        if similarity is not None and served == self.gap and self.gap < self.longest:
            self.queue.append(similarity)
            self.queue = self.queue[-self.window :]
            if len(self.queue) == self.window and sum(self.queue) / self.window > self.threshold:
                self.times_grown += 1
                self.gap = min(int(self.first * self.growth**self.times_grown), self.longest)
                self.queue = []
        if step == self.next:
            self.next = step + self.gap
        self.last = step
