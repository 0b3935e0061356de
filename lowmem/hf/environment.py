"""What a run ran on, for environment.json: versions and devices, nothing about the person or the host."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

PACKAGES = (
    "lowmem",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "tokenizers",
    "datasets",
    "bitsandbytes",
)


def package_versions() -> dict[str, str | None]:
    """Installed versions; None for a package that is not installed."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def describe_environment(world_size: int) -> dict[str, Any]:
    """Versions, device names and their memory in bytes."""
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append({"name": properties.name, "bytes": properties.total_memory})
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "packages": package_versions(),
        "cuda": torch.version.cuda,
        "gpus": devices,
        "world_size": world_size,
    }
