"""The part of a logging interval that a checkpoint cuts off, so that a continued run writes the same rows."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "interval.json"


@dataclass(frozen=True)
class Interval:
    """`loss`: the sum over `steps` steps since the last regular row. NaN stays NaN."""

    loss: float
    steps: int


def write_interval(folder: Path, interval: Interval) -> None:
    (folder / FILE).write_text(json.dumps(asdict(interval)), encoding="utf-8")


def read_interval(checkpoint: Path) -> Interval:
    return Interval(**json.loads((checkpoint / FILE).read_text(encoding="utf-8")))
