"""When a basis is fitted anew."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.optim.rule import Context


@dataclass(frozen=True)
class Every:
    """At a parameter's first step and every `gap` steps after it: steps 1, 1 + gap, 1 + 2 gap, ...

    With `staggers` the refreshes after the first are spread: parameter i of n in its group takes those of
    steps 1 + offset + k gap, offset = floor(i gap / n), so that each step has few of them.
    """

    gap: int
    staggers: bool = False

    def is_due(self, ctx: Context) -> bool:
        return ctx.step == 1 or (ctx.step > 1 and (ctx.step - 1 - self._offset(ctx)) % self.gap == 0)

    def steps_since(self, ctx: Context) -> int:
        """Updates made with the current basis, this one included."""
        since = (ctx.step - 1 - self._offset(ctx)) % self.gap + 1
        return min(since, ctx.step)

    def _offset(self, ctx: Context) -> int:
        return ctx.index * self.gap // ctx.count if self.staggers else 0
