"""doctor: versions, devices, extras, disk, and a step that really runs."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import tomllib
from pathlib import Path

import pytest
import torch

from lowmem.cli import doctor, installation
from lowmem.cli.tiny_step import take_tiny_step
from tests.cli.conftest import Command

PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]


def test_doctor_tells_a_program_everything_it_tells_a_person(lowmem: Command) -> None:
    done = lowmem("doctor", "--json")
    found = json.loads(done.out)
    assert done.code == 0
    assert found["healthy"] is True
    versions = {package["name"]: package["version"] for package in found["packages"]}
    for name in ("torch", "transformers", "accelerate", "peft", "safetensors", "datasets"):
        assert versions[name] == importlib.metadata.version(name)
    assert versions["python"].startswith("3.1")
    assert {"bitsandbytes", "deepspeed", "triton"} <= set(versions)
    assert found["devices"][0]["kind"] == "cpu"
    assert sum(device["kind"] == "cuda" for device in found["devices"]) == torch.cuda.device_count()
    assert 0 < found["free_disk_bytes"] <= shutil.disk_usage(".").total
    assert found["tiny_step"][0] == {"device": "cpu", "ok": True, "problem": None}
    printed = lowmem("doctor").out
    for version in versions.values():
        assert version is None or version in printed
    assert "All is well." in printed


def test_the_extras_are_those_of_the_package_with_the_command_that_installs_them() -> None:
    extras = {extra.name: extra for extra in installation.extras()}
    assert set(extras) == set(PYPROJECT["optional-dependencies"])
    assert extras["peers"].command == "pip install 'lowmem[peers]'"


def test_a_missing_extra_is_shown_with_its_command(lowmem: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    real = installation.installed_version
    monkeypatch.setattr(
        installation, "installed_version", lambda name: None if name == "sgd-sai" else real(name)
    )
    monkeypatch.setattr(doctor, "take_tiny_step", lambda device: None)
    printed = lowmem("doctor").out
    assert "missing sgd-sai: pip install 'lowmem[peers]'" in printed


def test_a_package_that_is_too_old_makes_doctor_fail_with_what_to_type(
    lowmem: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = installation.installed_version
    monkeypatch.setattr(
        installation, "installed_version", lambda name: "4.0" if name == "transformers" else real(name)
    )
    monkeypatch.setattr(doctor, "take_tiny_step", lambda device: None)
    done = lowmem("doctor")
    assert done.code == 5
    assert "4.0 does not do; pip install 'transformers>=5.17'" in done.out
    assert "Something is wrong" in done.out


def test_a_step_that_fails_is_shown_and_makes_doctor_fail(
    lowmem: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **settings: object) -> None:
        raise RuntimeError("no kernel image is available\nand more")

    monkeypatch.setattr("lowmem.optim.build_optimizer", broken)
    assert take_tiny_step("cpu") == "RuntimeError: no kernel image is available"
    done = lowmem("doctor")
    assert done.code == 5
    assert "RuntimeError: no kernel image is available" in done.out
