"""Start one process for each task, a few at a time, and record how each ended, until the time is up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_validation.document import ALLOCATORS, FAILED, MEASURED, NOT_RUN, Document

SCRIPT = Path(__file__).resolve().parent.parent / "gpu_validate.py"
OUT_OF_TIME = "out of time"
LEAST_SECONDS = 20.0
"""With less left no task is begun."""

MOST_AT_ONCE, CORES_FOR_EACH = 4, 4
"""One trains on the card while the next are planned on the host."""

LEFT_OUT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


@dataclass
class Children:
    """`seconds` are the whole time there is, `limit_seconds` those of one stage of a task."""

    device: str
    document: Document
    seconds: float
    limit_seconds: float

    def run(self, tasks: Sequence[str]) -> None:
        self._deadline = time.monotonic() + self.seconds
        self._writing = threading.Lock()
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(self._at_once()) as pool:
            self._folder = Path(folder)
            waiting = [pool.submit(self._one, task) for task in tasks]
            try:
                for each in waiting:
                    each.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _at_once(self) -> int:
        if self.device != "cuda":
            return 1
        return max(1, min(MOST_AT_ONCE, (os.cpu_count() or 1) // CORES_FOR_EACH))

    def _one(self, task: str) -> None:
        start = time.monotonic()
        left = self._deadline - start
        if left < LEAST_SECONDS:
            self._record(task, {"status": NOT_RUN, "reason": OUT_OF_TIME}, 0.0)
            return
        part, said = self._folder / f"{task}.json", self._folder / f"{task}.txt"
        try:
            with said.open("w") as output:
                code: int | None = subprocess.run(
                    self._command(task, part),
                    env=environment(task),
                    stdout=output,
                    stderr=output,
                    timeout=left,
                ).returncode
        except subprocess.TimeoutExpired:
            code = None
        found = json.loads(part.read_text(encoding="utf-8")) if part.is_file() else {"status": FAILED}
        self._record(task, ended(found, code, said.read_text(errors="replace")), time.monotonic() - start)

    def _command(self, task: str, part: Path) -> list[str]:
        how = {
            "--child": task,
            "--device": self.device,
            "--part": part,
            "--lock": self._folder / "card",
            "--limit": self.limit_seconds,
        }
        return [sys.executable, str(SCRIPT), *(str(word) for pair in how.items() for word in pair)]

    def _record(self, task: str, found: dict[str, Any], seconds: float) -> None:
        with self._writing:
            self.document.record(task, found)
        words = found["status"] + (f": {found['reason']}" if "reason" in found else "")
        print(f"{task:24s} {seconds:6.1f} s  {words}", file=sys.stderr, flush=True)


def ended(found: dict[str, Any], code: int | None, said: str) -> dict[str, Any]:
    """`found` with the reason where the process did not say one. `code` is None when its time was up."""
    found = dict(found)
    stage = found.pop("stage", "starting")
    if found["status"] != FAILED:
        return found
    if code is None:
        return found | {"status": NOT_RUN, "reason": f"{OUT_OF_TIME} while {stage}"}
    if "reason" not in found:
        last = next((line for line in reversed(said.splitlines()) if line.strip()), "it said nothing").strip()
        is_late = "Timeout (" in said
        found["reason"] = f"{stage} took too long" if is_late else f"{stage} ended with code {code}: {last}"
    return found


def environment(task: str) -> dict[str, str]:
    """Of one process with one card, the allocator's usual settings and no network."""
    kept = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    kept |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    kept["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if task == ALLOCATORS[1]:
        kept["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return kept


def went_well(document: Document) -> bool:
    """Whether nothing that was asked for failed."""
    content = document.content
    entries = [*content["configurations"], *(value for value in content.values() if isinstance(value, dict))]
    return all(entry.get("status", MEASURED) != FAILED for entry in entries)
