"""manifest.json: the size and the checksum of every file of a folder, so that damage is found before it is read.

The checksum is xxh3_128: it finds accidents, not forgers, and is many times as fast as a disk. The
manifest carries one of its own content too.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

MANIFEST = "manifest.json"
FORMAT = 1
CHECKSUM = "xxh3_128"
READ_BYTES = 2**20
READ_BY_LIBRARIES = (".safetensors", ".bin", ".pt", ".pth", ".json")
"""A file of such a name that the manifest does not list might be loaded in place of one that it does."""


class DamagedError(Exception):
    """A file is not what was written. The text names it: `model.safetensors has 512 bytes instead of 1024`."""


@dataclass(frozen=True)
class FileRecord:
    size_bytes: int
    checksum: str  # hexadecimal


@dataclass(frozen=True)
class Manifest:
    """`dropped` names files that were deleted on purpose, after a newer checkpoint was complete."""

    step: int
    files: dict[str, FileRecord]
    dropped: tuple[str, ...] = ()

    def without(self, names: Iterable[str]) -> Manifest:
        gone = [name for name in names if name in self.files]
        kept = {name: record for name, record in self.files.items() if name not in gone}
        return replace(self, files=kept, dropped=tuple(sorted({*self.dropped, *gone})))


def describe_files(folder: Path, *, step: int) -> Manifest:
    """The manifest of what `folder` holds now; every file is read once."""
    records = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            records[name] = FileRecord(path.stat().st_size, checksum_of(path))
    return Manifest(step, records)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Atomically: a reader, and a crash at any moment, finds the old one or the new one."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "step": manifest.step,
        "checksum": CHECKSUM,
        "files": {
            name: {"bytes": record.size_bytes, "checksum": record.checksum}
            for name, record in manifest.files.items()
        },
        "dropped": list(manifest.dropped),
    }
    text = json.dumps({**content, "own_checksum": _checksum_of_content(content)}, indent=1)
    unfinished = folder / f".{MANIFEST}.new"
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    """Raises DamagedError when it is missing or not as it was written."""
    path = folder / MANIFEST
    if not path.exists():
        raise DamagedError(f"{MANIFEST} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        own_checksum = content.pop("own_checksum")
    except OSError as error:
        raise DamagedError(f"{MANIFEST} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedError(f"{MANIFEST} is not as it was written") from error
    if own_checksum != _checksum_of_content(content):
        raise DamagedError(f"{MANIFEST} is not as it was written")
    if content["format"] != FORMAT:
        raise DamagedError(f"{MANIFEST} has format {content['format']}, this version reads {FORMAT}")
    files = {name: FileRecord(one["bytes"], one["checksum"]) for name, one in content["files"].items()}
    return Manifest(content["step"], files, tuple(content["dropped"]))


def verify_files(folder: Path, *, checksums: bool = True) -> Manifest:
    """Hold every file against the manifest: its size, and with `checksums` its content.

    Raises DamagedError for the first file that is missing, differs, or is not listed and might be loaded.
    """
    manifest = read_manifest(folder)
    for name, record in manifest.files.items():
        _refuse_other_size(folder / name, name, record)
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        listed = name in manifest.files or name in manifest.dropped or name == MANIFEST
        if not listed and path.is_file() and path.suffix in READ_BY_LIBRARIES:
            raise DamagedError(f"{name} does not belong to it")
    if checksums:
        for name, record in manifest.files.items():
            _refuse_other_content(folder / name, name, record)
    return manifest


def checksum_of(path: Path) -> str:
    """Hexadecimal xxh3_128 of a file."""
    with path.open("rb", buffering=0) as file:
        return checksum_of_stream(file)


def checksum_of_stream(file: io.RawIOBase | io.BytesIO) -> str:
    """That of what is left of `file`, read in pieces of 1 MiB."""
    digest = xxhash.xxh3_128()
    piece = bytearray(READ_BYTES)
    view = memoryview(piece)
    while count := file.readinto(piece):
        digest.update(view[:count])
    return digest.hexdigest()


def _refuse_other_size(path: Path, name: str, record: FileRecord) -> None:
    try:
        found_bytes = path.stat().st_size
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        found = "is missing" if missing else f"cannot be read ({error.strerror})"
        raise DamagedError(f"{name} {found}") from error
    if not path.is_file():
        raise DamagedError(f"{name} is not a file")
    if found_bytes != record.size_bytes:
        raise DamagedError(f"{name} has {found_bytes} bytes instead of {record.size_bytes}")


def _refuse_other_content(path: Path, name: str, record: FileRecord) -> None:
    try:
        found = checksum_of(path)
    except OSError as error:
        raise DamagedError(f"{name} cannot be read ({error.strerror})") from error
    if found != record.checksum:
        raise DamagedError(f"{name} has other content than was written (its checksum differs)")


def _checksum_of_content(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()
