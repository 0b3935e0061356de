"""Ctrl-C and SIGTERM ask for a stop; the run grants it at a step boundary, with a checkpoint saved."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType

EXIT_CODE = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO_SECONDS = 0.5  # launchers pass a Ctrl-C on to processes that the terminal has already told
STDERR = 2


class Interrupt:
    """Context manager. Inside, the first signal only sets `requested`; a second one ends the process.

    A process of a launch that leaves it with an error ignores SIGTERM from then on: launchers send that to those that
    are left, and it has yet to say what it knows. Outside the main thread Python delivers no signals, so there it
    changes nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._requested_at = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous and error is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self._previous[signal.SIGTERM] = signal.SIG_IGN
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # os.write and os._exit: a handler may run inside print itself, which is not re-entrant.
        now = time.monotonic()
        if self.requested:
            if now - self._requested_at >= ECHO_SECONDS:
                os.write(STDERR, b"\nstopped at once, nothing saved\n")
                os._exit(EXIT_CODE)
            return
        self.requested = True
        self._requested_at = now
        name = signal.Signals(number).name.encode()
        os.write(STDERR, b"\n" + name + b": stopping at the end of this step; once more to stop at once\n")
