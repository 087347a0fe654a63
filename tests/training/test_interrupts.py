"""The first signal is noted, the second ends the process at once, and afterwards all is as it was."""

import os
import signal

import pytest

from deltanet.training.interrupts import Interrupts


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_the_first_signal_is_noted(number: signal.Signals, name: str) -> None:
    before = signal.getsignal(number)
    with Interrupts() as interrupts:
        assert interrupts.received is None
        signal.raise_signal(number)
        assert interrupts.received == name
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_the_process_at_once(second: signal.Signals) -> None:
    child = os.fork()
    if child == 0:
        with Interrupts():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(second)
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == second
