"""What a person sees of a run while it trains."""

from __future__ import annotations

import io
import math

import pytest

from lowmem.hf.progress import Progress, clock, described

ROW = {"loss": 2.5, "tokens_per_second": 12345.6, "peak_allocated_bytes": 3 * 2**30, "step": 7}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_elsewhere_than_on_a_terminal_each_row_is_a_line(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr("sys.stderr", out)
    progress = Progress(0, 20)
    progress.advance(5)
    progress.show(5, ROW)
    progress.say("a remark")
    progress.close()
    first, second = out.getvalue().splitlines()
    assert first.startswith("step 5/20  loss 2.5000  12,346 tokens/s  peak 3.00 GiB  left 0:")
    assert second == "a remark"


def test_on_a_terminal_one_line_updates_and_remarks_stay_above_it(monkeypatch):
    out = Terminal()
    monkeypatch.setattr("sys.stderr", out)
    progress = Progress(3, 20)
    for step in range(4, 21):
        progress.advance(step)
    progress.show(20, ROW)
    progress.say("a remark")
    progress.close()
    text = out.getvalue()
    assert "a remark\n" in text
    last = text.split("\r")[-1]
    assert "20/20" in last
    assert "| loss 2.5000  12,346 tokens/s  peak 3.00 GiB  left 00:00" in last
    assert text.count("\n") == 2, "the remark, and the end of the bar"


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"loss": math.nan}, "loss NaN  12,346 tokens/s  peak 3.00 GiB"),
        ({"peak_allocated_bytes": None}, "loss 2.5000  12,346 tokens/s"),
        ({"tokens_per_second": None}, "loss 2.5000  peak 3.00 GiB"),
    ],
)
def test_nan_is_shown_and_the_unknown_left_out(change, shown):
    assert described({**ROW, **change}) == shown


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (90, "1:30"), (3700, "1:01:40")])
def test_times_are_shown_as_a_clock_does(seconds, text):
    assert clock(seconds) == text
