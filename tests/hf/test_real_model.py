"""The real thing: a pretrained LLaMA of 260,032 parameters learns to tell children's stories."""

from __future__ import annotations

import json

import pytest

from lowmem.hf.flow import train
from lowmem.recipe.load import load_recipe
from tests.real_data import DATA, needs_data

ZERO_SHOT_LOSS = 2.12
"""Nats per token of the untrained model on these held-out rows, cut at 256 tokens."""


@needs_data
@pytest.mark.parametrize(
    ("name", "lr", "settings"),
    [
        ("galore", 6e-3, ["optimizer.rank=16"]),
        pytest.param("sgd_sai", 3e-3, [], marks=pytest.mark.slow),
    ],
)
def test_forty_steps_bring_the_held_out_loss_far_below_zero_shot(name, lr, settings, tmp_path):
    """Budget: 40 steps of 8 rows of 256 tokens.."""
    stories = DATA / "stories" / "child.jsonl.gz"
    changes = [
        f"model.name_or_path={DATA / 'stories260k'}",
        *(f"data.{part}.path={stories}" for part in ("train", "eval")),
        *(f"data.{part}.format=prompt_response" for part in ("train", "eval")),
        "data.train.take=0.9",
        "data.eval.skip=0.9",
        "data.max_length=256",
        "data.template=plain",
        "eval.loss_only=true",
        "eval.max_batches=4",
        "eval.batch_size=16",
        f"optimizer.name={name}",
        f"optimizer.lr={lr}",
        *settings,
        "train.max_steps=40",
        "train.per_device_batch_size=8",
        "report.baseline=none",
        f"save.dir={tmp_path / 'run'}",
    ]
    assert train(load_recipe("quickstart", changes)) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    before, after = (row["eval_loss"] for row in (rows[0], rows[-1]))
    assert before == pytest.approx(ZERO_SHOT_LOSS, abs=0.05)
    assert after < BOUND[name]


BOUND = {"galore": 1.65, "sgd_sai": 1.85}
"""Measured 1.477 and 1.640 on a CPU; the margin is for other libraries and machines."""
