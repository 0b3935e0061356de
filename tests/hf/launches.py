"""Runs by the command and the files that a user has, over processes on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEEPSPEED = Path(sys.prefix, "deepspeed")
"""Beside the environment and not in it: Accelerate imports it everywhere it finds it."""

with_deepspeed = pytest.mark.skipif(
    not DEEPSPEED.is_dir(), reason="needs DeepSpeed beside the environment: make test puts it there"
)

# A rule that steps rows apart, one that needs the matrix, and for the rest a large eps: what differs is then sums of
# gradients, not signs of the smallest.
OPTIMIZER = (
    "optimizer={name: sinkgd, lr: 1.0e-2, clip: full, fallback: {name: adamw, eps: 1.0e-3}, "
    "groups: [{match: [o_proj, down_proj], name: swan, lr: 3.0e-3}]}"
)
SETTINGS = (
    OPTIMIZER,
    "train.max_grad_norm=0.5",
    "train.gradient_accumulation_steps=2",
    "save.every=2",
    "save.optimizer_states=all",
    "report.log_every=1",
)


def start(
    strategy: str, *arguments: str, options: tuple[str, ...] = (), folder: Path = ROOT
) -> subprocess.Popen[str]:
    """`accelerate launch` of a recipe with the shipped file of `strategy`."""
    path = os.pathsep.join([str(ROOT), str(DEEPSPEED), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", str(ROOT / "recipes" / "accelerate" / f"{strategy}.yaml")),
            *("--main_process_port", str(free_port()), *options),  # the last one counts
            *("-m", "lowmem.train", *arguments),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )


def launched(strategy: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return ended(start(strategy, *arguments))


def ended(process: subprocess.Popen[str], seconds: float | None = None) -> subprocess.CompletedProcess[str]:
    """Raises TimeoutExpired for one that hangs."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def ranks_of(launcher: int) -> dict[int, int]:
    """The processes that a launcher has started: their ids by rank."""
    found = {}
    for thread in Path(f"/proc/{launcher}/task").iterdir():
        for child in (thread / "children").read_text().split():
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            found |= {int(one[5:]): int(child) for one in variables if one.startswith(b"RANK=")}
    return found


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
