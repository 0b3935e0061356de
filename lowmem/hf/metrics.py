"""metrics.jsonl: one JSON object a line, readable by any JSON parser, never repeating a step.

JSON has no NaN and no infinity, so those are written as the strings "NaN", "Infinity" and "-Infinity".
A value nobody measured is null, never 0.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
    """The rows of one run. A row with `eval_loss` comes from an evaluation, every other from training.

    `last_good` gives the checkpoint that a full disk leaves intact, for the message.
    """

    def __init__(self, path: Path, last_good: Callable[[], Path | None] = lambda: None):
        self.path = path
        self.last_good = last_good

    @property
    def replacement(self) -> Path:
        """What `path` will be when rows are removed; a crash may leave it."""
        return self.path.with_name(self.path.name + ".new")

    def rows(self) -> Iterator[dict[str, Value]]:
        """Every complete row. A last line that a crash cut in two is left out."""
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and "step" in row:
                yield row

    def append(self, row: Mapping[str, Value]) -> None:
        """All of the row in one write, or nothing. Raises FaultError when the disk does not take it."""
        text = json.dumps({name: printable_number(value) for name, value in row.items()}, allow_nan=False)
        line = text.encode() + b"\n"
        with self._disk_faults_explained():
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                before = os.fstat(file).st_size
                if before and os.pread(file, 1, before - 1) != b"\n":
                    line = b"\n" + line  # after what a crash cut in two
                written = os.write(file, line)
                if written != len(line):  # the disk took the beginning only
                    os.ftruncate(file, before)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(file)

    def flush_to_disk(self) -> None:
        """Return when the rows would survive a power cut. Raises FaultError when the disk fails."""
        if not self.path.is_file():
            return
        with self._disk_faults_explained():
            file = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(file)
            finally:
                os.close(file)

    def forget_after_(self, step: int | None, *, row_is_provisional: bool = False) -> None:
        """Remove the rows of steps that will be run again; None removes all. A line cut in two goes too.

        row_is_provisional: the training row of `step` itself ended no interval, an interrupt added it; the
        continued run writes the one that does.
        """

        def is_kept(row: dict[str, Value]) -> bool:
            if step is None or int(row["step"] or 0) > step:
                return False
            return not (row_is_provisional and row["step"] == step and "loss" in row)

        self._keep_(is_kept)

    def forget_evaluation_(self, step: int) -> None:
        """Remove the evaluation after `step`, which is about to be made again."""
        self._keep_(lambda row: "eval_loss" not in row or row["step"] != step)

    def _keep_(self, is_kept: Callable[[dict[str, Value]], bool]) -> None:
        if not self.path.exists():
            return
        lines = [json.dumps(row) + "\n" for row in self.rows() if is_kept(row)]
        with self._disk_faults_explained():
            with self.replacement.open("w", encoding="utf-8") as file:
                file.write("".join(lines))
                file.flush()
                os.fsync(file.fileno())
            os.replace(self.replacement, self.path)

    @contextmanager
    def _disk_faults_explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            checkpoint = self.last_good()
            intact = (
                f"The last complete checkpoint, {checkpoint}, is"
                if checkpoint
                else "What was saved before is"
            )
            raise FaultError(
                f"{self.path} cannot be written: {error.strerror}. {intact} intact; free some disk space and run again."
            ) from error

    def training_seconds(self) -> float:
        """Seconds that earlier parts of this run have trained."""
        seconds = [row["seconds"] for row in self.rows() if isinstance(row.get("seconds"), (int, float))]
        return max((float(value) for value in seconds if value is not None), default=0.0)

    def evaluations(self) -> list[dict[str, Value]]:
        return [row for row in self.rows() if "eval_loss" in row]
