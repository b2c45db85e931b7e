"""Reactions to signals that do not wait for the main thread, as Python's own handlers do."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

_OVER = 0  # no signal has this number


@contextlib.contextmanager
def listening(react: Callable[[int], None]) -> Iterator[None]:
    """Call ``react`` in a thread with the number of every signal that has a Python handler.

    Only the main thread may enter this context. Inside another one, this one hears the signals.
    """
    end, writing = os.pipe()
    os.set_blocking(writing, False)

    def listen() -> None:
        while True:
            for number in os.read(end, 64):
                if number == _OVER:  # what came before it is heard
                    return
                react(number)

    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(writing, bytes([_OVER]))
        thread.join()
        os.close(end)
        os.close(writing)


@contextlib.contextmanager
def last_words(text: str) -> Iterator[None]:
    """Print a line when SIGTERM comes, and exit at once with status 143.

    Where SIGTERM has a handler already, or outside the main thread, this does nothing.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def react(number: int) -> None:
        if number == signal.SIGTERM and signal.getsignal(number) is _nothing:
            from gae_jax.runtime import lock  # imports numpy, which --help does not need

            print(text, file=sys.stderr, flush=True)
            lock.release_all()
            os._exit(128 + number)

    signal.signal(signal.SIGTERM, _nothing)
    try:
        with listening(react):
            yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _nothing(number, frame) -> None:
    """A handler: without one, the thread that listens would not hear the signal."""
