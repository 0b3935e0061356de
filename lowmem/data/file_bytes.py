"""A file's bytes and lines, with gzip undone and damage reported by name and line."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from lowmem.errors import RecipeError

GZIP_MAGIC = b"\x1f\x8b"
UTF8_BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


def open_lines(path: Path, where: str) -> Iterator[bytes]:
    """The file's lines with their line ends, without a byte-order mark, decompressed as they are read."""
    number = 0
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, 1):
                if number == 1:
                    _refuse_utf16(line, path)
                    line = line.removeprefix(UTF8_BOM)
                yield line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(path, number, where) from error
    except OSError as error:
        raise RecipeError(f"{where}.path: {path} cannot be read: {error.strerror}.") from error


def read_bytes(path: Path, where: str) -> bytes:
    """The whole file, decompressed, without a byte-order mark."""
    return b"".join(open_lines(path, where))


def decoded(data: bytes, name: str) -> str:
    """`data` as UTF-8 with line ends turned into a newline; RecipeError names the first line that is not."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{name}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8."
        ) from error
    return text.replace("\r\n", "\n")


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as stream:
        is_gzip = stream.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    return cast("IO[bytes]", gzip.open(path)) if is_gzip else path.open("rb")


def _refuse_utf16(line: bytes, path: Path) -> None:
    if line.startswith(UTF16_BOMS):
        raise RecipeError(f"{path}:1: the file is UTF-16; save it as UTF-8.")


def _damaged(path: Path, lines: int, where: str) -> RecipeError:
    return RecipeError(
        f"{where}.path: {path}:{lines + 1}: the gzip data is damaged or ends early after {lines} whole "
        "lines; copy or download the file again."
    )
