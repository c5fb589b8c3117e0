"""Signals that were held arrive once, whoever waits for them."""

import asyncio
import os
import signal

import pytest

from fastrot.signals import TERMINATIONS, held_signals


@pytest.fixture(autouse=True)
def interruptible():
    """A shell starts its background jobs deaf to Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def raised(number):
    os.kill(os.getpid(), number)


def test_asyncio_is_told_once():
    """Its handlers hear of a signal through a file descriptor, which the first arrival writes."""
    told = []

    async def work():
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, told.append, "SIGTERM")
        with held_signals(), held_signals():
            raised(signal.SIGTERM)
        assert told == []
        for _ in range(5):
            await asyncio.sleep(0.01)
        loop.remove_signal_handler(signal.SIGTERM)

    asyncio.run(work())
    assert told == ["SIGTERM"]


@pytest.mark.parametrize("number", TERMINATIONS)
def test_a_handler_gets_number_and_frame(number):
    got = []
    before = signal.signal(number, lambda *args: got.append(args))
    try:
        with held_signals():
            raised(number)
            assert got == []
    finally:
        signal.signal(number, before)
    ((told, frame),) = got
    assert told == number
    assert frame is not None


def test_both_arrive_though_the_first_raises():
    got = []
    before = signal.signal(signal.SIGTERM, lambda *_: got.append("SIGTERM"))
    try:
        with pytest.raises(KeyboardInterrupt), held_signals():
            raised(signal.SIGINT)
            raised(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == ["SIGTERM"]
