"""Ctrl-C and SIGTERM: what is noted, what raises, and whose handler is called."""

import contextlib
import os
import signal
import threading

import pytest

from gpt_2_simple.training.interruption import Interruption


@contextlib.contextmanager
def handled_by(number, handler):
    """Within this block the user has set this handler."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def test_first_signal_is_noted_and_the_second_raises():
    with Interruption() as interruption:
        assert not interruption.requested
        signal.raise_signal(signal.SIGINT)
        assert interruption.requested
        assert not interruption.requested_twice
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert interruption.requested_twice
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ignored_sigint_stays_ignored():
    with handled_by(signal.SIGINT, signal.SIG_IGN):
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGINT)
            assert not interruption.requested
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_handler_that_was_not_set_in_python_stays(monkeypatch):
    """signal.getsignal() returns None for it, and signal.signal() refuses None."""
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Interruption() as interruption, pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert not interruption.requested
    finally:
        signal.signal(signal.SIGINT, before)


def test_own_sigterm_handler_is_called_when_the_block_ends():
    received = []
    with handled_by(signal.SIGTERM, lambda number, frame: received.append(number)):
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGTERM)
            assert interruption.requested
            assert received == []
        assert received == [signal.SIGTERM]


def test_other_threads_leave_the_handlers_alone():
    def enter():
        with Interruption():
            found.append(signal.getsignal(signal.SIGINT))

    found = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_is_ended_by_sigterm():
    with Interruption() as interruption:
        child = os.fork()
        if child == 0:
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                os._exit(0)  # the signal was swallowed
        status = os.waitpid(child, 0)[1]
        assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
        assert not interruption.requested


def test_signal_ends_a_block_at_once():
    with Interruption() as interruption:
        with interruption.ends_block():
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the block was not left")
        assert interruption.requested
