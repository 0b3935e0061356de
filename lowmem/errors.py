"""What a user is told when something cannot work, and the exit code that goes with it.

Every error a person can cause derives from `LowMemError`; the command line prints its text as one
paragraph and leaves with `exit_code`. Anything else that escapes is a bug in lowmem.
"""

from __future__ import annotations


class LowMemError(Exception):
    """A problem the user can mend. The message says what was found, what is allowed, what to change."""

    exit_code = 2


class RecipeError(LowMemError, ValueError):
    """The recipe, the data it names, or the arguments are wrong. `problems` holds one line each."""

    def __init__(self, problems: list[str] | str):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class RefusedError(LowMemError, ValueError):
    """Every part is valid, but the combination cannot work; the message names the nearest one that does."""

    exit_code = 4


class FaultError(LowMemError, RuntimeError):
    """A run stopped on a fault (disk, memory, non-finite loss); its last checkpoint is intact."""

    exit_code = 5
