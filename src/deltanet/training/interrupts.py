"""Ctrl-C and SIGTERM end a run between two steps, not within one."""

import signal
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """While it is entered, the first signal only notes its name in `received`; the second ends the process at once.

    Outside the main thread, where Python hands out no signals, it notes none.
    """

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> "Interrupts":
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
