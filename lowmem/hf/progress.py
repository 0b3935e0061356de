"""How far a run is, for people: one line that updates on a terminal, one line a logged step elsewhere."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

from lowmem.hf.metrics import Value, printable_number
from lowmem.memory.wording import size


def clock(seconds: float) -> str:
    """90 -> 1:30, 3700 -> 1:01:40."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def described(row: Mapping[str, Value]) -> str:
    """Loss, speed and peak memory of a row of metrics.jsonl; what is unknown is left out."""
    loss, speed, peak = row["loss"], row["tokens_per_second"], row["peak_allocated_bytes"]
    is_finite = isinstance(loss, float) and math.isfinite(loss)
    parts = [f"loss {loss:.4f}" if is_finite else f"loss {printable_number(loss)}"]
    if isinstance(speed, (int, float)):
        parts.append(f"{speed:,.0f} tokens/s")
    if isinstance(peak, int):
        parts.append(f"peak {size(peak)}")
    return "  ".join(parts)


class Progress:
    """Written to stderr, so that stdout keeps results only."""

    def __init__(self, done: int, total: int):
        self.first, self.total = done, total
        self.started = time.monotonic()
        self.bar: tqdm | None = None
        if sys.stderr.isatty():
            form = "{n_fmt}/{total_fmt} |{bar}| {desc}  left {remaining}"
            # Some terminals say they are 0 columns wide; this takes 80 for those.
            columns = shutil.get_terminal_size().columns
            self.bar = tqdm(initial=done, total=total, bar_format=form, ncols=columns)

    def advance(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def show(self, step: int, row: Mapping[str, Value]) -> None:
        text = described(row)
        if self.bar is not None:
            self.bar.set_description_str(text)
            return
        seconds_a_step = (time.monotonic() - self.started) / max(step - self.first, 1)
        left = clock(seconds_a_step * (self.total - step))
        print(f"step {step}/{self.total}  {text}  left {left}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
