"""`lowmem doctor`: what this machine has, what is missing, and whether a tiny step works."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lowmem import __version__
from lowmem.cli.arguments import Arguments
from lowmem.cli.installation import extras, other_packages, python_version, required_packages
from lowmem.cli.output import print_columns, print_json
from lowmem.cli.tiny_step import take_tiny_step
from lowmem.errors import FaultError

GIB = 2**30


def run(arguments: Sequence[str]) -> int:
    parser = Arguments(
        "doctor", "Show versions, devices, extras and free disk, and try one tiny training step."
    )
    parser.add_json()
    options = parser.read(arguments)
    found = examine()
    if options.json:
        print_json(found)
    else:
        _print(found)
    return 0 if found["healthy"] else FaultError.exit_code


def examine() -> dict[str, Any]:
    """Everything `lowmem doctor --json` prints."""
    needed = required_packages()
    devices, step = _devices()
    return {
        "lowmem": __version__,
        "packages": [asdict(each) for each in [python_version(), *needed, *other_packages()]],
        "devices": devices,
        "extras": [asdict(each) for each in extras()],
        "free_disk_bytes": shutil.disk_usage(".").free,
        "working_directory": os.getcwd(),
        "tiny_step": step,
        "healthy": not any(each.problem for each in needed) and all(each["ok"] for each in step),
    }


def _devices() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The devices training would use, and how a tiny step went on the first of each kind."""
    devices: list[dict[str, Any]] = [{"kind": "cpu", "cores": os.cpu_count()}]
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        problem = f"torch cannot be imported: {error}"
        return devices, [{"device": "cpu", "ok": False, "problem": problem}]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        devices.append({"kind": "cuda", "name": name, "total_bytes": total, "free_bytes": free})
    steps = []
    for device in ("cpu", "cuda") if len(devices) > 1 else ("cpu",):
        problem_found = take_tiny_step(device)
        steps.append({"device": device, "ok": problem_found is None, "problem": problem_found})
    return devices, steps


def _print(found: dict[str, Any]) -> None:
    print(f"lowmem {found['lowmem']}")
    print("\npackages")
    print_columns([(each["name"], _package(each)) for each in found["packages"]])
    print("\ndevices")
    print_columns([_device(each) for each in found["devices"]])
    print("\nextras")
    print_columns([(each["name"], _extra(each)) for each in found["extras"]])
    if not found["extras"]:
        print("  unknown: lowmem is not installed here (pip install -e . in its folder)")
    print("\nfree disk")
    print_columns([(f"{found['free_disk_bytes'] / GIB:.1f} GiB", found["working_directory"])])
    print("\na tiny training step")
    print_columns([(each["device"], each["problem"] or "works") for each in found["tiny_step"]])
    print("\nAll is well." if found["healthy"] else "\nSomething is wrong; see above.")


def _package(package: dict[str, Any]) -> str:
    return package["problem"] or package["version"] or "not installed"


def _device(device: dict[str, Any]) -> tuple[str, str]:
    if device["kind"] == "cpu":
        return "cpu", f"{device['cores']} cores"
    total, free = device["total_bytes"] / GIB, device["free_bytes"] / GIB
    return "cuda", f"{device['name']}, {total:.1f} GiB, {free:.1f} GiB of it free"


def _extra(extra: dict[str, Any]) -> str:
    if not extra["missing"]:
        return f"installed ({', '.join(extra['packages'])})"
    return f"missing {', '.join(extra['missing'])}: {extra['command']}"
