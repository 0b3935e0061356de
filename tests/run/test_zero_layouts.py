"""The flat tensors of DeepSpeed's ZeRO, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem.optim.registry import OPTIMIZERS

ROOT = Path(__file__).parents[2]
DEEPSPEED = Path(sys.prefix, "deepspeed")


@pytest.mark.slow
@pytest.mark.skipif(not DEEPSPEED.is_dir(), reason="needs DeepSpeed beside the environment")
@pytest.mark.parametrize(("stage", "where"), [(1, ""), (2, ""), (3, ""), (2, "host"), (3, "host")])
def test_every_optimizer_makes_the_steps_of_one_process_under_zero(tmp_path, stage, where):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    path = os.pathsep.join([str(ROOT), str(DEEPSPEED), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "-m", "tests.run.zero_steps", str(stage), str(tmp_path / "found.json"), where],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == OPTIMIZERS.keys()
    for name, distance in found.items():
        assert distance["furthest"] < max(5e-5, 1e-3 * distance["moved"]), name
        assert distance["moved"] > 0, name
