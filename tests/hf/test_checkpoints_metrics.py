"""metrics.jsonl across crashes: whole rows only, whatever a killed process left."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from lowmem.errors import FaultError
from lowmem.hf.metrics import MetricsFile

ROWS = [{"step": step, "loss": step / 7, "text": "\u00e4\u2192"} for step in range(1, 5)]


def filled(path):
    metrics = MetricsFile(path)
    for row in ROWS:
        metrics.append(row)
    return metrics


def test_cut_at_any_byte_the_file_goes_on_with_whole_rows(tmp_path):
    whole = filled(tmp_path / "whole.jsonl").path.read_bytes()
    for length in range(len(whole) + 1):
        metrics = MetricsFile(tmp_path / "cut.jsonl")
        metrics.path.write_bytes(whole[:length])
        survivors = whole[:length].count(b"\n") + (whole[length - 1 : length + 1] == b"}\n")
        metrics.append({"step": 9, "loss": 0.0})
        assert list(metrics.rows()) == [*ROWS[:survivors], {"step": 9, "loss": 0.0}]
        metrics.forget_after_(9)
        lines = metrics.path.read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [*range(1, survivors + 1), 9]


def test_a_disk_that_takes_half_a_row_gets_none_of_it(tmp_path, monkeypatch):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", lambda: tmp_path / "checkpoint-3")
    metrics.append(ROWS[0])
    before = metrics.path.read_bytes()
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: real(file, data[: len(data) // 2]))
        with pytest.raises(FaultError, match=r"No space left on device\. The last .*checkpoint-3, is intact"):
            metrics.append(ROWS[1])
    assert metrics.path.read_bytes() == before


APPENDING = """
import sys
from pathlib import Path
from lowmem.hf.metrics import MetricsFile
metrics = MetricsFile(Path(sys.argv[1]))
print("ready", flush=True)
step = 0
while True:
    step += 1
    metrics.append({"step": step, "text": "x" * (step % 5000)})
"""


def test_a_process_killed_while_it_writes_leaves_whole_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with subprocess.Popen(
        [sys.executable, "-c", APPENDING, str(path)], stdout=subprocess.PIPE, text=True
    ) as one:
        assert one.stdout.readline() == "ready\n"
        while not path.exists() or path.stat().st_size < 2**20:
            assert one.poll() is None
        one.kill()
    text = path.read_text()
    assert text.endswith("}\n")
    steps = [json.loads(line)["step"] for line in text.splitlines()]
    assert steps == list(range(1, len(steps) + 1))


def test_the_row_that_an_interrupt_added_is_forgotten_and_the_evaluation_beside_it_is_not(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for row in ({"step": 4, "loss": 1.0}, {"step": 6, "loss": 1.0}, {"step": 6, "eval_loss": 2.0}):
        metrics.append(row)
    metrics.forget_after_(6, row_is_provisional=True)
    assert list(metrics.rows()) == [{"step": 4, "loss": 1.0}, {"step": 6, "eval_loss": 2.0}]
