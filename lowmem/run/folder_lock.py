"""One run a folder: a lock that the kernel releases when its process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from lowmem.errors import RefusedError

LOCK_FILE = "run.lock"
_HELD_ELSEWHERE = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
OWNER_WAIT_SECONDS = 0.5  # how long a process that has just locked may take to write who it is


@dataclass
class _Held:
    file: int
    owners: int


_held: dict[Path, _Held] = {}  # of this process: a second run of it in the same folder comes after the first


class FolderLock:
    """Holds the lock until `release`, until it is garbage, or until the process ends. Made by `lock_folder`.

    `unsupported` says why the file system cannot lock; None where it can.
    """

    def __init__(self, path: Path, unsupported: str | None = None):
        self._path: Path | None = path
        self.unsupported = unsupported

    def release(self) -> None:
        """Does nothing the second time. The file stays: deleting it could split a lock in two."""
        path, self._path = self._path, None
        held = None if path is None else _held.get(path)
        if path is None or held is None:
            return
        held.owners -= 1
        if held.owners == 0:
            del _held[path]
            os.close(held.file)

    def __del__(self) -> None:
        self.release()


def lock_folder(folder: Path) -> FolderLock:
    """Lock `folder` for this process, which may lock it again.

    Raises RefusedError, naming process and host, when another process has it; OSError when the folder
    cannot be written.
    """
    path = folder.resolve() / LOCK_FILE
    if path in _held:
        _held[path].owners += 1
        return FolderLock(path)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = _owner(file) if error.errno in _HELD_ELSEWHERE else ""
        os.close(file)
        if owner:
            raise RefusedError(
                f"{folder} is in use by another run: {owner}. Wait until it ends, stop it, or choose another "
                "save.dir."
            ) from error
        if error.errno not in _NO_LOCKS_HERE:
            raise
        return FolderLock(path, unsupported=error.strerror)
    _held[path] = _Held(file, owners=1)
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
    return FolderLock(path)


def _owner(file: int) -> str:
    """`process 123 on host`, as the owner wrote it."""
    end = time.monotonic() + OWNER_WAIT_SECONDS
    while True:
        try:
            owner = json.loads(os.pread(file, 4096, 0))
            return f"process {owner['pid']} on {owner['host']}"
        except (ValueError, KeyError, TypeError):
            if time.monotonic() > end:
                return "a process that has not said which"
        time.sleep(0.02)


def _forget_in_child() -> None:
    """A forked child, such as a data worker, must not keep the lock of a parent that was killed."""
    for held in _held.values():
        os.close(held.file)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
