"""What the driver says of the card: memory in use by all processes, which no allocator's counter includes."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

MIB = 2**20
SETTLED_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 10.0


def conditions() -> dict[str, Any]:
    """The card and the software a result depends on, as JSON values. Asks for the device only if there is one."""
    from lowmem.hf.environment import package_versions

    found: dict[str, Any] = {
        "packages": package_versions() | {"triton": _triton_version()},
        "cuda": torch.version.cuda,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "driver": asked_of_nvidia_smi("driver_version"),
        }
    return found


def bytes_in_use() -> int | None:
    """Device memory in use by everybody, None where nvidia-smi does not say."""
    mebibytes = asked_of_nvidia_smi("memory.used")
    return int(float(mebibytes) * MIB) if mebibytes and mebibytes.replace(".", "", 1).isdigit() else None


def settled(reading: Callable[[], int | None]) -> int | None:
    """`reading` once it stays the same: a process that ended before gives its memory back a moment later."""
    deadline = time.monotonic() + LONGEST_WAIT_SECONDS
    now = reading()
    while True:
        time.sleep(SETTLED_SECONDS)
        before, now = now, reading()
        if now == before or time.monotonic() > deadline:
            return now


def free_bytes() -> int:
    return torch.cuda.mem_get_info()[0]


def asked_of_nvidia_smi(field: str) -> str | None:
    """One field of the first visible card; None where there is no such program or it fails."""
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "-i", index]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.strip().splitlines()), None)


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)
