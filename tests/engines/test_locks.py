"""The lock that calls read and changes of weights write."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from engines.locks import ReadWriteLock

SOON = 10.0  # seconds, within which what may run has run


def started(run: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def reader(lock: ReadWriteLock) -> tuple[threading.Thread, threading.Event]:
    """Start a thread that reads until the event is set."""
    leave, reading = threading.Event(), threading.Event()

    def run() -> None:
        with lock.read():
            reading.set()
            leave.wait(SOON)

    thread = started(run)
    assert reading.wait(SOON)
    return thread, leave


def test_readers_hold_it_together() -> None:
    lock, inside = ReadWriteLock(), threading.Barrier(3)

    def run() -> None:
        with lock.read():
            inside.wait(SOON)  # breaks unless all three are inside at once

    threads = [started(run) for _ in range(3)]
    for thread in threads:
        thread.join(SOON)
    assert not inside.broken


def test_writer_waits_for_readers_and_goes_before_later_ones() -> None:
    lock, order = ReadWriteLock(), []
    reading, leave = threading.Event(), threading.Event()

    def first() -> None:
        with lock.read():
            reading.set()
            leave.wait(SOON)
            order.append("first")

    def writer() -> None:
        with lock.write():
            order.append("writer")

    def later() -> None:
        with lock.read():
            order.append("later")

    threads = [started(first)]
    assert reading.wait(SOON)
    threads.append(started(writer))
    while not lock._waiting_writers:
        time.sleep(0.001)
    threads.append(started(later))
    time.sleep(0.05)
    assert order == []
    leave.set()
    for thread in threads:
        thread.join(SOON)
    assert order == ["first", "writer", "later"]


def test_thread_takes_it_again_in_any_order() -> None:
    lock = ReadWriteLock()
    with lock.read(), lock.read(), lock.write(), lock.read(), lock.write():
        pass
    with lock.write():
        assert lock._writer == threading.get_ident()
    assert (lock._readers, lock._writer, lock._depth) == ({}, None, 0)


def test_two_readers_that_write_do_not_deadlock() -> None:
    lock, both, written = ReadWriteLock(), threading.Barrier(2), []

    def run() -> None:
        with lock.read():
            both.wait(SOON)
            with lock.write():
                written.append(threading.get_ident())
            mine = written[-1] == threading.get_ident()  # no other writer before this reader is done
            time.sleep(0.01)
            assert mine
            assert written[-1] == threading.get_ident()

    threads = [started(run) for _ in range(2)]
    for thread in threads:
        thread.join(SOON)
    assert len(written) == 2
    assert not lock._readers


def test_interrupted_wait_leaves_the_lock_free(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = ReadWriteLock()
    thread, leave = reader(lock)

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lock._changed, "wait", interrupted)
        with lock.read(), pytest.raises(KeyboardInterrupt):
            lock.write().__enter__()
    leave.set()
    thread.join(SOON)
    with lock.write():
        pass
    assert (lock._readers, lock._writer, lock._depth, lock._waiting_writers) == ({}, None, 0, 0)


def test_fork_keeps_the_shares_of_the_one_thread() -> None:
    lock = ReadWriteLock()
    thread, leave = reader(lock)
    condition = lock._changed
    with lock.read():
        readers = dict(lock._readers)
        lock.after_fork()
        assert list(lock._readers) == [threading.get_ident()]
        with lock.write():
            pass
    assert not lock._readers
    lock._readers, lock._changed = {thread.ident or 0: readers[thread.ident or 0]}, condition
    leave.set()
    thread.join(SOON)
