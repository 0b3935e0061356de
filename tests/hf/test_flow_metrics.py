"""metrics.jsonl, the learning-rate schedule and the check of the disk."""

from __future__ import annotations

import json
import math
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from lowmem.errors import FaultError
from lowmem.hf.disk import refuse_too_small_disk
from lowmem.hf.metrics import MetricsFile
from lowmem.hf.schedule import learning_rate_factor, warmup_steps
from lowmem.recipe.schema import SchedulerRecipe


@pytest.fixture
def metrics(tmp_path):
    return MetricsFile(tmp_path / "metrics.jsonl")


def test_nan_and_infinity_are_written_as_names_and_unknown_as_null(metrics):
    metrics.append({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": -math.inf, "peak": None})
    text = metrics.path.read_text()
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {"step": 1, "loss": "NaN", "grad_norm": "Infinity", "lr": "-Infinity", "peak": None}


def test_rows_of_steps_that_run_again_are_forgotten(metrics):
    for step in range(1, 6):
        metrics.append({"step": step, "loss": 1.0})
    metrics.append({"step": 3, "eval_loss": 2.0})
    metrics.forget_after_(3)
    assert [(row["step"], "eval_loss" in row) for row in metrics.rows()] == [
        (1, False),
        (2, False),
        (3, False),
        (3, True),
    ]
    metrics.forget_after_(None)
    assert list(metrics.rows()) == []


def test_a_line_that_a_crash_cut_in_two_is_left_out(metrics):
    metrics.append({"step": 1, "loss": 1.0})
    with metrics.path.open("a") as file:
        file.write('{"step": 2, "lo')
    metrics.forget_after_(7)
    metrics.append({"step": 3, "loss": 0.5})
    assert [row["step"] for row in metrics.rows()] == [1, 3]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux' always full device")
def test_a_full_disk_is_a_fault():
    with pytest.raises(FaultError, match="/dev/full cannot be written: No space left on device"):
        MetricsFile(Path("/dev/full")).append({"step": 1})


def test_an_evaluation_that_is_made_again_loses_its_old_row_only(metrics):
    for row in ({"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.0}, {"step": 4, "eval_loss": 0.5}):
        metrics.append(row)
    metrics.forget_evaluation_(2)
    assert list(metrics.rows()) == [{"step": 2, "loss": 1.0}, {"step": 4, "eval_loss": 0.5}]


def test_seconds_of_a_continued_run_count_on_from_the_last_row(metrics):
    metrics.append({"step": 1, "loss": 1.0, "seconds": 2.5})
    metrics.append({"step": 2, "loss": 1.0, "seconds": 4.0})
    metrics.append({"step": 2, "eval_loss": 1.0})
    assert metrics.training_seconds() == 4.0


def factors(schedule: SchedulerRecipe, total: int) -> list[float]:
    factor = learning_rate_factor(schedule, total)
    return [factor(step) for step in range(total)]


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.5, 1.0])
def test_no_step_of_any_schedule_has_learning_rate_zero(name, total, ratio):
    values = factors(SchedulerRecipe(name=name, warmup_ratio=ratio), total)
    assert all(0 < value <= 1 for value in values)
    assert max(values) == 1


def test_warmup_rises_evenly_to_one_and_then_the_shape_begins():
    values = factors(SchedulerRecipe(name="linear", warmup_steps=3), 8)
    assert values == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_equals_the_schedule_of_torch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        oracle.step()
    assert factors(SchedulerRecipe(name="cosine", warmup_ratio=0.0), 20) == pytest.approx(expected)


def test_warmup_steps_win_over_the_ratio_and_leave_one_step():
    assert warmup_steps(SchedulerRecipe(warmup_steps=5, warmup_ratio=0.9), 100) == 5
    assert warmup_steps(SchedulerRecipe(warmup_steps=500), 100) == 99
    assert warmup_steps(SchedulerRecipe(warmup_ratio=0.03), 100) == 3


def test_too_little_disk_is_a_fault_with_both_numbers(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100 * 2**30, 97 * 2**30, 3 * 2**30))
    sizes = {"checkpoint_bytes": 2**30, "final_model_bytes": 2**29}
    refuse_too_small_disk(tmp_path, checkpoints_to_come=2, **sizes)
    with pytest.raises(FaultError, match=r"has 3\.00 GiB free, this run needs 3\.50 GiB: 3 checkpoint"):
        refuse_too_small_disk(tmp_path, checkpoints_to_come=3, **sizes)
