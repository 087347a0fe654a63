"""How long a run has taken, how fast it is, and how long it may still take."""

import time
from collections import deque

TIMED_STEPS = 20


class Clock:
    """Started with a call of the trainer; `before` are the seconds of earlier calls, `minutes` the limit of this one."""

    def __init__(self, before: float, minutes: float | None) -> None:
        self._started = time.monotonic()
        self._before = before
        self._limit = None if minutes is None else 60 * minutes
        self._steps: deque[tuple[float, int]] = deque(maxlen=TIMED_STEPS)
        self._done = 0

    @property
    def seconds(self) -> float:
        """Of training, over all calls."""
        return self._before + self._elapsed

    @property
    def is_over(self) -> bool:
        return self._limit is not None and self._elapsed >= self._limit

    def step(self, seconds: float, tokens: int) -> None:
        """Notes one step."""
        self._steps.append((seconds, tokens))
        self._done += 1

    @property
    def tokens_per_second(self) -> float:
        """Of the last steps, without what lies between them."""
        seconds, tokens = map(sum, zip(*self._steps, strict=True))
        return tokens / max(seconds, 1e-9)

    def left(self, steps: int | None) -> float | None:
        """Seconds until `steps` more are done, evaluations included, or the limit is reached; None where neither is known."""
        bounds = []
        if steps is not None:
            bounds.append(steps * self._elapsed / self._done)
        if self._limit is not None:
            bounds.append(max(0.0, self._limit - self._elapsed))
        return min(bounds, default=None)

    def steps_that_fit(self, share: float) -> int | None:
        """How many more steps take `share` of the time left; None before enough were timed."""
        if self._limit is None or len(self._steps) < TIMED_STEPS:
            return None
        recent = [seconds for seconds, _ in self._steps][TIMED_STEPS // 2 :]  # the first are slower
        return int(share * max(0.0, self._limit - self._elapsed) / (sum(recent) / len(recent)))

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self._started
