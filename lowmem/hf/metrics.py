"""metrics.jsonl: one JSON object a line, readable by any JSON parser, never repeating a step.

JSON has no NaN and no infinity, so those are written as the strings "NaN", "Infinity" and "-Infinity".
A value nobody measured is null, never 0.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from lowmem.errors import FaultError

Value = float | int | str | None


def printable_number(value: Value) -> Value:
    """`value` as strict JSON can hold it: a non-finite float becomes its name."""
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            return "NaN"
        return "Infinity" if value > 0 else "-Infinity"
    return value


class MetricsFile:
    """The rows of one run. A row with `eval_loss` comes from an evaluation, every other from training."""

    def __init__(self, path: Path):
        self.path = path

    def rows(self) -> Iterator[dict[str, Value]]:
        """Every complete row. A last line that a crash cut in two is left out."""
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            yield row

    def append(self, row: Mapping[str, Value]) -> None:
        """Raises FaultError when the disk does not take it."""
        text = json.dumps({name: printable_number(value) for name, value in row.items()}, allow_nan=False)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:
            raise FaultError(
                f"{self.path} cannot be written: {error.strerror}. Checkpoints saved before are intact; free some disk "
                "space and run again."
            ) from error

    def forget_after_(self, step: int | None) -> None:
        """Remove the rows of steps that will be run again; None removes all."""
        self._keep_(lambda row: step is not None and int(row["step"] or 0) <= step)

    def forget_evaluation_(self, step: int) -> None:
        """Remove the evaluation after `step`, which is about to be made again."""
        self._keep_(lambda row: "eval_loss" not in row or row["step"] != step)

    def _keep_(self, is_kept: Callable[[dict[str, Value]], bool]) -> None:
        if not self.path.exists():
            return
        lines = [json.dumps(row) + "\n" for row in self.rows() if is_kept(row)]
        replacement = self.path.with_name(self.path.name + ".new")
        replacement.write_text("".join(lines), encoding="utf-8")
        os.replace(replacement, self.path)

    def training_seconds(self) -> float:
        """Seconds that earlier parts of this run have trained."""
        seconds = [row["seconds"] for row in self.rows() if isinstance(row.get("seconds"), (int, float))]
        return max((float(value) for value in seconds if value is not None), default=0.0)

    def evaluations(self) -> list[dict[str, Value]]:
        return [row for row in self.rows() if "eval_loss" in row]
