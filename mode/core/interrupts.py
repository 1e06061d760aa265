"""Interrupts: Ctrl-C, SIGTERM and SIGHUP end a command, and its child processes end with it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that interrupt a command."""


REPEAT = 0.2
"""Seconds between two attempts to interrupt the main thread."""


PARENT = "MODE_PARENT"
"""Environment variable with the process id of the parent that `end_with_launcher` checks."""


SET_PARENT_DEATH_SIGNAL = 1  # linux/prctl.h


@contextmanager
def raising_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt when a signal interrupts this context. Signals that are ignored, as by nohup, stay so.

    Python discards an exception that is raised in a destructor or in the callback of a weak reference, and a library
    may discard any exception while it imports an optional package. So the exception is raised again until the context
    ends, except while the stack unwinds because of it. A context that a signal interrupted never ends normally.
    """
    received = False

    def interrupt(*_: object) -> None:
        nonlocal received
        received = True
        signal.setitimer(signal.ITIMER_REAL, REPEAT, REPEAT)
        raise KeyboardInterrupt

    def interrupt_again(*_: object) -> None:
        if not is_unwinding():
            raise KeyboardInterrupt

    handlers = {number: interrupt for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN}
    before = {signal.SIGALRM: signal.signal(signal.SIGALRM, interrupt_again)}
    try:
        for number, handler in handlers.items():
            before[number] = signal.signal(number, handler)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, former in before.items():
            signal.signal(number, former)
        if received:
            raise KeyboardInterrupt


def is_unwinding() -> bool:
    """Return whether the stack unwinds because of a KeyboardInterrupt: a `finally` or `except` block of it runs.

    >>> is_unwinding()
    False
    """
    error = sys.exception()
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


@contextmanager
def blocking_interrupts() -> Iterator[None]:
    """Delay Ctrl-C until this context ends. Processes that start in the context never receive Ctrl-C.

    If the process has other threads, one of them may receive the signal, which then interrupts the context.
    """
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # starting the tracker would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """End this process, a child of `multiprocessing`, as soon as its parent ends, even by SIGKILL.

    The parent of a child of a fork server is the process that asked for the child. The kernel does not report the end
    of that process to the child, so a thread waits for the end of the pipe between the two.
    """
    from multiprocessing import parent_process
    from multiprocessing.connection import wait

    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_with_launcher() -> None:
    """Let the kernel kill this process, a direct child of `mode launch`, as soon as the launcher ends. Linux only."""
    import ctypes

    parent = os.environ.get(PARENT)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):  # the parent ended before the call
        os._exit(1)
