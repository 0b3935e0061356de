"""One run a folder, between real processes."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowmem.errors import RefusedError
from lowmem.run.folder_lock import LOCK_FILE, lock_folder

HOLDING = """
import sys
import time
from pathlib import Path
from lowmem.run.folder_lock import lock_folder
lock = lock_folder(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path until its input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        if process.poll() is None:
            process.stdin.close()


def test_a_second_process_is_refused_with_the_pid_and_host_of_the_first(tmp_path, holder):
    expected = rf"in use by another run: process {holder.pid} on {socket.gethostname()}\. Wait until"
    with pytest.raises(RefusedError, match=expected):
        lock_folder(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_leaves_a_file_that_blocks_nobody(tmp_path, holder, number):
    holder.send_signal(number)
    holder.wait()
    assert str(holder.pid) in (tmp_path / LOCK_FILE).read_text()
    lock_folder(tmp_path).release()


def lock_within_seconds(folder, seconds):
    end = time.monotonic() + seconds
    while True:
        try:
            return lock_folder(folder)
        except RefusedError:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_child_that_outlives_a_killed_run_does_not_keep_its_lock(tmp_path):
    fork = "import os\nchild = os.fork()\nif child == 0:\n    sys.stdin.read()\n    os._exit(0)\n"
    code = HOLDING.replace('print("locked"', fork + "print(child")
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        child = int(process.stdout.readline())
        process.kill()
        process.wait()
        lock = lock_within_seconds(tmp_path, 30)  # it may not have come to its first line yet
        os.kill(child, 0)  # it is there
        lock.release()


def test_one_process_may_run_twice_in_a_folder_and_releases_it_after_the_last(tmp_path):
    def is_free():
        code = "import sys; from pathlib import Path; from lowmem.run.folder_lock import lock_folder\n"
        code += "lock_folder(Path(sys.argv[1]))"
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, check=False)
        return done.returncode == 0

    first = lock_folder(tmp_path)
    second = lock_folder(tmp_path)
    first.release()
    first.release()
    assert not is_free()
    del second
    assert is_free()


def test_a_lock_works_on_another_file_system(holder, tmp_path):
    place = Path("/dev/shm")
    if not place.is_dir() or place.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    folder = place / f"lowmem-lock-{os.getpid()}"
    folder.mkdir()
    try:
        with subprocess.Popen(
            [sys.executable, "-c", HOLDING, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout.readline() == "locked\n"
            with pytest.raises(RefusedError, match=f"process {process.pid} on"):
                lock_folder(folder)
            process.kill()
            process.wait()
        lock_folder(folder).release()
    finally:
        (folder / LOCK_FILE).unlink()
        folder.rmdir()


def test_a_file_system_without_locks_is_said_and_stops_nobody(tmp_path, monkeypatch):
    def unsupported(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert lock_folder(tmp_path).unsupported == "No locks available"
