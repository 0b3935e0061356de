"""What is installed beside lowmem, read from package metadata without importing any of it."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement

OTHERS = ("tokenizers", "numpy", "triton", "datasets", "bitsandbytes", "deepspeed", "torchao", "trl")


@dataclass(frozen=True)
class Installed:
    """One package. `problem` says why lowmem cannot work with it, and what to type."""

    name: str
    version: str | None
    problem: str | None = None


@dataclass(frozen=True)
class Extra:
    name: str
    packages: list[str]
    missing: list[str]
    command: str


def python_version() -> Installed:
    return Installed("python", platform.python_version())


def required_packages() -> list[Installed]:
    """What lowmem needs, with a problem for each that is missing or too old."""
    found = []
    for requirement, extra in _requirements():
        if extra is None:
            version = installed_version(requirement.name)
            problem = None
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                state = "missing" if version is None else f"{version} does not do"
                problem = f"{state}; pip install '{requirement.name}{requirement.specifier}'"
            found.append(Installed(requirement.name, version, problem))
    return found


def other_packages() -> list[Installed]:
    """Packages that matter to fine-tuning and that lowmem does without."""
    return [Installed(name, installed_version(name)) for name in OTHERS]


def extras() -> list[Extra]:
    """Every extra of lowmem, what it stands for, and how to get what is missing."""
    wanted: dict[str, list[str]] = {}
    missing: dict[str, list[str]] = {}
    for requirement, extra in _requirements():
        if extra is not None:
            wanted.setdefault(extra, []).append(requirement.name)
            version = installed_version(requirement.name)
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                missing.setdefault(extra, []).append(requirement.name)
    return [
        Extra(name, packages, missing.get(name, []), f"pip install 'lowmem[{name}]'")
        for name, packages in wanted.items()
    ]


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements() -> Iterator[tuple[Requirement, str | None]]:
    """(requirement, extra or None) of lowmem; nothing when it runs from a folder that was not installed."""
    from packaging.requirements import Requirement

    try:
        metadata = importlib.metadata.metadata("lowmem")
    except importlib.metadata.PackageNotFoundError:
        return
    names = metadata.get_all("Provides-Extra") or []
    for text in metadata.get_all("Requires-Dist") or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement, None
            continue
        for name in names:
            if requirement.marker.evaluate({"extra": name}):
                yield requirement, name
