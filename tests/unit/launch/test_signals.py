import hashlib
import os
import signal
import threading
import time

import pytest

from nemo_minitron.launch import signals


@pytest.fixture(autouse=True)
def _listening(monkeypatch):
    monkeypatch.setattr(signals, "_received", None)
    monkeypatch.setattr(signals, "_held", False)
    monkeypatch.setattr(signals, "_listening", False)
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    signals.listen()
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_where_there_is_nothing_to_save_the_signal_ends_it_at_once(number):
    with pytest.raises(signals.Stop, match=f"stopped by {number.name}"):
        os.kill(os.getpid(), number)
    assert not issubclass(signals.Stop, Exception), "no `except Exception` on the way out may take it for a failure"


def test_in_training_it_waits_to_be_asked_for():
    signals.hold()
    assert signals.requested() is None
    os.kill(os.getpid(), signal.SIGUSR1)
    assert signals.requested() == "SIGUSR1"
    signals.release()
    with pytest.raises(signals.Stop):
        os.kill(os.getpid(), signal.SIGTERM)


def test_it_is_told_of_while_the_main_thread_is_in_a_call_of_c():
    told: list[tuple[str, float]] = []
    signals.hold()
    signals.tell_at_once(lambda name: told.append((name, time.monotonic())))
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)  # about 2 s without a line of Python
    ended = time.monotonic()
    ((name, at),) = told
    assert name == "SIGUSR1" == signals.requested() and ended - at > 0.2


def test_a_handler_that_was_put_before_it_is_taken_away():
    ours = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda number, frame: ours(number, frame))
    signals.hold()
    signals.listen_alone()
    assert signal.getsignal(signal.SIGTERM) is ours


def test_where_nobody_listens_no_handler_is_changed(monkeypatch):
    monkeypatch.setattr(signals, "_listening", False)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signals.listen_alone()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
